#include "runtime/engine.h"

#include <gtest/gtest.h>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <optional>

#include "formats/error.h"
#include "formats/test_gguf.h"
#include "runtime/error.h"
#include "runtime/test_tiny_model.h"

namespace latte::runtime {
namespace {

using formats::error_text;

class EngineTest : public ::testing::Test {
 protected:
  static std::shared_ptr<const Model> open(const TinyModel& tiny, bool converted) {
    ModelOptions options;
    options.threads = 2;
    if (converted) options.adapter = tiny.adapter();
    return Model::open(tiny.path(), options);
  }
  std::shared_ptr<const Model> open(bool converted) const { return open(tiny_, converted); }
  static SessionOptions exact() {
    SessionOptions options;
    options.dtype = kernels::DType::kFloat32;
    return options;
  }
  // Relative distance of the last logits.
  static double distance(std::span<const float> got, const std::vector<double>& expected) {
    double difference = 0.0, norm = 0.0;
    EXPECT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      difference += std::pow(got[i] - expected[i], 2);
      norm += expected[i] * expected[i];
    }
    return std::sqrt(difference / norm);
  }
  static double distance(std::span<const float> got, std::span<const float> expected) {
    return distance(got, std::vector<double>(expected.begin(), expected.end()));
  }

  TinyModel tiny_;
};

constexpr double kFloat32 = 1e-5;  // of sums over some hundreds of terms in a few layers
constexpr double kFloat16 = 5e-3;  // keys and values rounded to 11 bits (5e-4 each), in three layers with sharp scores

TEST_F(EngineTest, EqualsTheDefinitionHoweverItIsSplit) {
  TinyModel reads_all({.evicted = false}), with_floor({.layers = 4, .floor = true}), with_conv({.layers = 4, .conv = true});
  TinyModel narrow(
      {.kv_heads = 1, .layers = 4, .window = 2, .sinks = 0, .floor = true, .conv = true});  // less than a convolution
  TinyModel one({.layers = 4, .window = 1, .sinks = 1, .floor = true, .conv = true});
  const std::pair<TinyModel*, bool> cases[] = {{&tiny_, false},    {&tiny_, true},  {&reads_all, true}, {&with_floor, true},
                                               {&with_conv, true}, {&narrow, true}, {&one, true}};
  for (const auto& [tiny, converted] : cases) {
    const auto model = open(*tiny, converted);
    const std::vector<int32_t> tokens = tiny->tokens(60);
    const auto expected = tiny->logits(tokens, converted);
    for (const int threads : {1, 2, 3}) {
      Engine engine(model, {threads, {}, 16});
      for (const std::vector<int64_t>& pieces : std::vector<std::vector<int64_t>>{{60}, {1}, {2}, {13, 1, 1, 5}, {3, 31}}) {
        SCOPED_TRACE(::testing::Message() << "converted " << converted << " evicted " << tiny->shape().evicted << " floor "
                                          << tiny->shape().floor << " conv " << tiny->shape().conv << " threads " << threads
                                          << " pieces of " << pieces[0]);
        Session session(model, exact());
        size_t piece = 0;
        for (size_t read = 0; read < tokens.size();) {
          const auto count = std::min(tokens.size() - read, static_cast<size_t>(pieces[piece++ % pieces.size()]));
          const auto logits = engine.prefill(session, std::span(tokens).subspan(read, count));
          read += count;
          ASSERT_LT(distance(logits, expected[read - 1]), kFloat32) << "token " << read;
        }
        EXPECT_EQ(session.position(), 60);
      }
    }
  }
}

TEST_F(EngineTest, GivesEveryTokensLogits) {
  const auto model = open(true);
  Engine engine(model, {2, {}, 64});
  const std::vector<int32_t> tokens = tiny_.tokens(40);
  const auto expected = tiny_.logits(tokens, true);
  Session session(model, exact());
  const StepPart part{&session, tokens, true};
  const auto logits = engine.step({&part, 1});
  const auto vocabulary = static_cast<size_t>(tiny_.shape().vocabulary);
  ASSERT_EQ(logits.size(), 40 * vocabulary);
  for (size_t t = 0; t < 40; ++t) EXPECT_LT(distance(logits.subspan(t * vocabulary, vocabulary), expected[t]), kFloat32);
}

TEST_F(EngineTest, HalfPrecisionStatesAreClose) {
  TinyModel with_both({.layers = 4, .floor = true, .conv = true});
  for (TinyModel* tiny : {&tiny_, &with_both}) {
    const auto model = open(*tiny, true);
    Engine engine(model, {2, {}, 16});
    const std::vector<int32_t> tokens = tiny->tokens(50);
    Session whole(model), steps(model);
    const auto expected = tiny->logits(tokens, true);
    const auto read = engine.prefill(whole, tokens);
    EXPECT_LT(distance(read, expected.back()), kFloat16);
    const std::vector<float> kept(read.begin(), read.end());
    for (size_t i = 0; i + 1 < tokens.size(); ++i) engine.decode(steps, tokens[i]);
    // Rounded alike in both: what remains is the order of sums, where rounding rarely falls to the other side.
    EXPECT_LT(distance(engine.decode(steps, tokens.back()), kept), 2e-4);
  }
}

// Sessions that take turns, alone and together, on two engines, copied, saved, loaded and dropped, against the definition.
TEST_F(EngineTest, RandomSchedulesEqualEachSessionAlone) {
  TinyModel with_both({.layers = 4, .floor = true, .conv = true});
  const std::pair<TinyModel*, bool> cases[] = {{&tiny_, false}, {&tiny_, true}, {&with_both, true}};
  for (const auto& [chosen, converted] : cases) {
    TinyModel& tiny = *chosen;
    const auto model = open(tiny, converted);
    Engine one(model, {1, {}, 12}), two(model, {2, {}, 12});
    std::mt19937 random(7);
    struct Running {
      std::optional<Session> session;
      std::vector<int32_t> tokens;
    };
    std::vector<Running> running(4);
    for (Running& r : running) r.session.emplace(model, exact());
    const auto expect = [&, converted = converted](const Running& r, std::span<const float> logits) {
      ASSERT_LT(distance(logits, tiny.logits(r.tokens, converted).back()), kFloat32);
    };
    for (int round = 0; round < 60; ++round) {
      Engine& engine = random() % 2 == 0 ? one : two;
      Running& some = running[random() % running.size()];
      Running& other = running[random() % running.size()];
      switch (random() % 7) {
        case 0:  // alone
        case 1: {
          const std::vector<int32_t> tokens = tiny.tokens(1 + static_cast<int64_t>(random() % 14));
          const auto logits = engine.prefill(*some.session, tokens);
          some.tokens.insert(some.tokens.end(), tokens.begin(), tokens.end());
          expect(some, logits);
          break;
        }
        case 2: {  // all together, a token or some each
          std::vector<std::vector<int32_t>> tokens;
          std::vector<StepPart> parts;
          for (Running& r : running) {
            tokens.push_back(tiny.tokens(1 + static_cast<int64_t>(random() % 3)));
            r.tokens.insert(r.tokens.end(), tokens.back().begin(), tokens.back().end());
          }
          for (size_t i = 0; i < running.size(); ++i) parts.push_back({&*running[i].session, tokens[i]});
          const auto logits = engine.step(parts);
          const auto vocabulary = static_cast<size_t>(tiny.shape().vocabulary);
          for (size_t i = 0; i < running.size(); ++i) expect(running[i], logits.subspan(i * vocabulary, vocabulary));
          break;
        }
        case 3:
          other = some;
          break;
        case 4:
          some.session->save(tiny / "state");
          other.session.emplace(Session::load(tiny / "state", model));
          other.tokens = some.tokens;
          break;
        case 5: {
          const auto half = static_cast<int64_t>(some.tokens.size() / 2);
          if (!some.session->can_truncate(half)) break;
          some.session->truncate(half);
          some.tokens.resize(some.tokens.size() / 2);
          break;
        }
        default:
          if (some.tokens.size() > 40) {
            some.session.emplace(model, exact());
            some.tokens.clear();
          }
      }
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(EngineTest, GoesBackWhereNothingWasLost) {
  const auto plain = open(false), converted = open(true);
  Engine engine(plain, {2, {}, 16});
  const std::vector<int32_t> tokens = tiny_.tokens(30);
  Session session(plain, exact());
  engine.prefill(session, tokens);
  EXPECT_TRUE(session.can_truncate(11));
  session.truncate(11);
  std::vector<int32_t> shorter(tokens.begin(), tokens.begin() + 11);
  shorter.push_back(5);
  EXPECT_LT(distance(engine.decode(session, 5), tiny_.logits(shorter, false).back()), kFloat32);

  TinyModel with_both({.layers = 4, .floor = true, .conv = true});
  for (const auto& [tiny, model] : {std::pair(&tiny_, converted), std::pair(&with_both, open(with_both, true))}) {
    Engine other(model, {2, {}, 16});
    Session latents(model, exact());
    other.prefill(latents, tokens);
    EXPECT_FALSE(latents.can_truncate(11));
    EXPECT_CONTAINS(error_text<SessionError>([&] { latents.truncate(11); }), "can't go back from token 30 to 11");
    latents.truncate(0);
    EXPECT_LT(distance(other.prefill(latents, tokens), tiny->logits(tokens, true).back()), kFloat32);
  }
}

TEST_F(EngineTest, MemoryIsKnownBeforehandAndConstant) {
  const auto model = open(false);
  SessionOptions options;
  options.context = 128;
  const Session session(model, options);
  EXPECT_EQ(session.bytes(), Session::bytes_needed(*model, options));
  EXPECT_EQ(session.room(), 128);
  SessionOptions longer = options;
  longer.context = 256;
  EXPECT_GT(Session::bytes_needed(*model, longer), session.bytes());
  // Every layer of a window: nothing grows.
  ModelOptions window;
  window.attention = {7, 2, 3};
  const auto constant = Model::open(tiny_.path(), window);
  EXPECT_EQ(Session::bytes_needed(*constant, options), Session::bytes_needed(*constant, longer));
  EXPECT_GT(Session(constant).room(), int64_t{1} << 60);
  SessionOptions huge;
  huge.context = int64_t{1} << 45;
  EXPECT_CONTAINS(error_text<MemoryError>([&] { Session(model, huge); }), "no memory for a session's state");
}

// What was promised counts before it is written: sessions that fit alone, but not together, are refused.
TEST_F(EngineTest, MemoryIsRefusedBeforeItRunsOut) {
  const auto model = open(false);
  const uint64_t free = available_memory();
  SessionOptions options;
  options.context = 1024;
  options.context = static_cast<int64_t>(free / 3 / (Session::bytes_needed(*model, options) / 1024));
  std::vector<Session> sessions;
  EXPECT_CONTAINS(error_text<MemoryError>([&] {
                    for (int i = 0; i < 8; ++i) sessions.emplace_back(model, options);
                  }),
                  "are free");
  EXPECT_GE(sessions.size(), 1u);
  EXPECT_LE(sessions.size(), 3u);
  sessions.clear();
  EXPECT_NO_THROW(Session(model, options));
}

// What a crash at any moment of saving leaves: the file as it was.
TEST_F(EngineTest, ACrashWhileSavingLeavesTheOldState) {
  const auto model = open(true);
  Engine engine(model, {1, {}, 16});
  Session session(model);
  engine.prefill(session, tiny_.tokens(20));
  const std::string path = tiny_ / "state";
  session.save(path);
  const std::string before = formats::read_bytes(path);
  engine.prefill(session, tiny_.tokens(3));
  // A child that saves again ends as soon as it has written some bytes: where a file may grow no larger, the system sends it a
  // signal.
  for (const rlim_t limit :
       {rlim_t{1}, rlim_t{100}, static_cast<rlim_t>(before.size() / 2), static_cast<rlim_t>(before.size() - 1)}) {
    const pid_t child = ::fork();
    if (child == 0) {
      const rlimit size = {limit, limit};
      ::setrlimit(RLIMIT_FSIZE, &size);
      const rlimit core = {0, 0};
      ::setrlimit(RLIMIT_CORE, &core);
      std::signal(SIGXFSZ, SIG_DFL);
      session.save(path);
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "limit " << limit;
    EXPECT_EQ(formats::read_bytes(path), before) << "limit " << limit;
  }
  EXPECT_EQ(Session::load(path, model).position(), 20);
  session.save(path);
  EXPECT_EQ(Session::load(path, model).position(), 23);
}

TEST_F(EngineTest, RefusesWhatCannotBe) {
  const auto model = open(false), other = open(true);
  Engine engine(model, {2, {}, 16});
  SessionOptions options = exact();
  options.context = 20;
  Session session(model, options), stranger(other);
  const std::vector<int32_t> tokens = tiny_.tokens(21);
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.prefill(session, tokens); }), "no room for 21 tokens behind 0");
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.decode(session, 50); }), "token 50 isn't in the vocabulary of 50");
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.decode(session, -1); }), "token -1");
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.prefill(session, {}); }), "no tokens");
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.decode(stranger, 1); }), "another model");
  const StepPart twice[] = {{&session, {tokens.data(), 1}}, {&session, {tokens.data(), 1}}};
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.step(twice); }), "twice");
  const StepPart much{&session, {tokens.data(), 17}};
  EXPECT_CONTAINS(error_text<SessionError>([&] { engine.step({&much, 1}); }), "17 tokens in one step, at most 16");
  EXPECT_EQ(session.position(), 0);
}

TEST_F(EngineTest, AStoppedPromptKeepsWhatWasRead) {
  const auto model = open(true);
  Engine engine(model, {2, {}, 16});
  Session session(model, exact());
  const std::vector<int32_t> tokens = tiny_.tokens(50);
  std::vector<int64_t> seen;
  const auto logits = engine.prefill(session, tokens, [&](int64_t read) { return seen.push_back(read), read < 32; });
  EXPECT_EQ(seen, (std::vector<int64_t>{16, 32}));
  EXPECT_EQ(session.position(), 32);
  EXPECT_LT(distance(logits, tiny_.logits({tokens.begin(), tokens.begin() + 32}, true).back()), kFloat32);
}

TEST_F(EngineTest, RefusesDamagedStates) {
  const auto model = open(true), plain = open(false);
  Engine engine(model, {2, {}, 16});
  Session session(model);
  engine.prefill(session, tiny_.tokens(20));
  const std::string path = tiny_ / "state";
  session.save(path);
  const std::string bytes = formats::read_bytes(path);
  const auto text = [&](const std::string& changed) {
    formats::write_bytes(tiny_ / "changed", changed);
    return error_text<StateError>([&] { Session::load(tiny_ / "changed", model); });
  };
  EXPECT_CONTAINS(error_text<StateError>([&] { Session::load(path, plain); }), "of another model");
  for (size_t size : {size_t{0}, size_t{10}, size_t{79}, size_t{111}, bytes.size() - 1}) {
    EXPECT_FALSE(text(bytes.substr(0, size)).empty()) << size;
  }
  EXPECT_CONTAINS(text(bytes + "x"), "cut short or damaged");
  session.save(tiny_ / "noted", "what was said");
  std::string note = "before";
  EXPECT_EQ(Session::load(tiny_ / "noted", model, &note).position(), 20);
  EXPECT_EQ(note, "what was said");
  EXPECT_EQ(Session::load(path, model, &note).position(), 20);
  EXPECT_EQ(note, "");
  std::string reworded = formats::read_bytes(tiny_ / "noted");
  reworded.replace(reworded.find("what was"), 8, "who were");
  EXPECT_CONTAINS(text(reworded), "checksum");
  std::string version = bytes;
  version[8] = 9;
  EXPECT_CONTAINS(text(version), "version 9");
  // Every byte counts.
  for (size_t i = 0; i < bytes.size(); i += 97) {
    std::string flipped = bytes;
    flipped[i] = static_cast<char>(flipped[i] ^ 0x10);
    EXPECT_FALSE(text(flipped).empty()) << "byte " << i;
  }
  EXPECT_THROW(Session::load(tiny_ / "nothing", model), formats::FileError);
  EXPECT_EQ(Session::load(path, model).position(), 20);
}

TEST_F(EngineTest, RefusesModelsThatLackSomething) {
  const formats::GgufFile file(tiny_.path());
  const auto text = [&](const std::function<void(formats::GgufMetadata&, std::vector<formats::GgufTensor>&)>& change) {
    formats::GgufMetadata metadata = file.metadata();
    std::vector<formats::GgufTensor> tensors = file.tensors();
    change(metadata, tensors);
    formats::write_gguf(tiny_ / "changed.gguf", metadata, tensors);
    try {
      Model::open(tiny_ / "changed.gguf");
    } catch (const ModelError& error) {
      return std::string(error.what());
    } catch (const formats::FormatError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(text([](auto&, auto&) {}), "");
  EXPECT_CONTAINS(text([](auto& metadata, auto&) { metadata.set("general.architecture", std::string("mamba")); }),
                  "expected one of \"llama\"");
  EXPECT_CONTAINS(text([](auto& metadata, auto&) { metadata.set("llama.attention.head_count_kv", uint32_t{3}); }), "divisor");
  EXPECT_CONTAINS(text([](auto& metadata, auto&) { metadata.set("llama.block_count", uint32_t{4}); }), "blk.3.");
  EXPECT_CONTAINS(text([](auto& metadata, auto&) { metadata.set("llama.feed_forward_length", uint32_t{63}); }), "expected [");
  EXPECT_CONTAINS(text([](auto&, auto& tensors) { tensors.erase(tensors.begin() + 5); }),
                  "missing tensors: \"blk.0.attn_q.weight\"");
  ModelOptions adapter_alone;
  EXPECT_CONTAINS(error_text<ModelError>([&] { Model::open(tiny_.adapter()); }), "an adapter, not a model");
}

// As ggml's writers leave it.
TEST_F(EngineTest, AnAdapterMayLackLeadingDimensionsOfOne) {
  TinyModel tiny({.kv_heads = 1, .layers = 4, .conv = true});
  ModelOptions options;
  options.threads = 2;
  options.adapter = tiny / "rewritten.gguf";
  EXPECT_GT(formats::write_without_leading_ones(tiny.adapter(), options.adapter), 0);
  const auto tokens = tiny.tokens(20);
  const auto logits = [&](const std::shared_ptr<const Model>& model) {
    Engine engine(model, {2, {}, 32});
    Session session(model, exact());
    const StepPart part{&session, tokens, false};
    const auto last = engine.step({&part, 1});
    return std::vector<float>(last.begin(), last.end());
  };
  EXPECT_EQ(logits(Model::open(tiny.path(), options)), logits(open(tiny, true)));
}

TEST_F(EngineTest, ThreadsThatFailStopTheOthers) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(pool.run([&](int thread) {
      pool.barrier();
      if (thread == round % 3) throw std::bad_alloc();
      pool.barrier();
    }),
                 std::bad_alloc);
    std::atomic<int> met{0};
    pool.run([&](int) {
      ++met;
      pool.barrier();
      EXPECT_EQ(met.load(), 3);
      pool.barrier();
    });
  }
}

}  // namespace
}  // namespace latte::runtime
