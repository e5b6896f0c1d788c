// The inference engine against the libtorch model for the same weights: plain, converted with random latents, on small models of
// every architecture and on the real SmolLM2 and Gemma 3.
#include "runtime/engine.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine_compare.h"
#include "extend/converted_model.h"
#include "formats/hash.h"
#include "formats/test_files.h"
#include "formats/test_models.h"
#include "formats/tokenizer.h"
#include "runtime/error.h"
#include "runtime/quantize.h"
#include "small_model.h"

namespace latte {
namespace {

using runtime::Engine;
using runtime::Model;
using runtime::Session;

constexpr double kQuantised = 1e-2;  // nats a token: what rounding activations to 8 bits may cost

// A base, and an adapter for it whose latents are random and open: every part of the mixture carries.
class Converted {
 public:
  Converted(const std::string& base, std::string adapter, int64_t window, int64_t sinks, int64_t latents, double key_scale,
            bool evicted = true, formats::LatentForm form = {})
      : base_(base), adapter_(std::move(adapter)) {
    const formats::GgufFile file(base);
    std::vector<formats::GgufTensorSpec> specs(file.tensors().begin(), file.tensors().end());
    const auto config = formats::decoder_config(file.metadata(), specs);
    spec_.window = window;
    spec_.sinks = sinks;
    spec_.far_limit = 3 * window;
    spec_.evicted = evicted;
    for (int64_t block = 0; block < config.num_layers; ++block) {
      // Of layers that read everything one keeps that, and one has no latents.
      spec_.latents.push_back(config.is_local(block) || block == 1 ? -1 : block == 2 ? 0 : static_cast<int32_t>(latents));
    }
    torch::manual_seed(5);
    const std::vector<formats::LatentForm> forms(spec_.latents.size(), form);
    tensors_ = extend::latent_tensors(extend::make_converted(base, spec_, forms, torch::kFloat32).converted);
    for (auto& [name, tensor] : tensors_) {
      const torch::NoGradGuard no_grad;
      tensor.normal_(0.0, name.ends_with("query.weight") || name.ends_with("key.weight") ? key_scale : 0.3);
      if (name.ends_with("decay")) tensor.sub_(4.0);
      if (name.ends_with("floor")) tensor.add_(2.0);  // about half of a short text's weights
      // Latents take about a third of the mixture. If they took nearly all, random as they are, some token of SmolLM2 would be so
      // far off that weights perturbed by 6e-8 move its logits by 2e-3 in float64.
      if (name.ends_with("gate.bias")) tensor.add_(std::log(2.0 * static_cast<double>(latents)));
    }
    write(base_, adapter_);
  }

  // The same weights beside another file of the same base.
  void write(const std::string& base, const std::string& adapter) {
    spec_.base_hash = formats::hash_of_file(base);
    extend::StoredTensors stored;
    for (const auto& [name, tensor] : tensors_) stored.add(name, tensor, extend::Storage::kFloat32);
    formats::write_adapter(adapter, spec_, formats::GgufFile(base), stored.tensors());
  }

  // Logits [T, vocabulary], float64.
  at::Tensor reference(const std::vector<int32_t>& tokens) const { return logits_of(*this, adapter_, tokens); }
  at::Tensor plain_reference(const std::vector<int32_t>& tokens) const {
    const torch::NoGradGuard no_grad;
    return models::load_decoder(base_)->forward(as_tensor(tokens)).logits[0].to(torch::kFloat64);
  }
  std::shared_ptr<const Model> open(bool converted = true) const {
    runtime::ModelOptions options;
    if (converted) options.adapter = adapter_;
    return Model::open(base_, options);
  }

 private:
  static at::Tensor as_tensor(const std::vector<int32_t>& tokens) {
    return torch::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
  }
  static at::Tensor logits_of(const Converted& self, const std::string& adapter, const std::vector<int32_t>& tokens) {
    const torch::NoGradGuard no_grad;
    auto converted = extend::load_converted(self.base_, adapter, torch::kFloat32);
    return converted.model->forward(as_tensor(tokens)).logits[0].to(torch::kFloat64);
  }

  std::string base_, adapter_;
  formats::AdapterSpec spec_;
  std::vector<std::pair<std::string, at::Tensor>> tensors_;
};

std::vector<int32_t> narrow(const std::vector<int64_t>& tokens) { return {tokens.begin(), tokens.end()}; }

TEST(EngineAgainstLibtorch, SmallModelsOfEveryArchitecture) {
  for (const char* architecture : {"llama", "gemma3"}) {
    SCOPED_TRACE(architecture);
    const formats::TestFolder folder;
    write_small_model(folder / "base.gguf", small_metadata(architecture));
    const auto tokens = narrow(small_tokens(150));
    const Converted reads_all(folder / "base.gguf", folder / "all.gguf", 13, 3, 5, 0.3, /*evicted=*/false);
    expect_the_same_on_every_way(reads_all.open(), tokens, reads_all.reference(tokens), {150, 37, 1});
    const Converted converted(folder / "base.gguf", folder / "adapter.gguf", 13, 3, 5, 0.3);
    expect_the_same_on_every_way(converted.open(), tokens, converted.reference(tokens), {150, 37, 1});
    const formats::LatentForm form = {.decay = false, .floor = true, .conv = true};
    const Converted floored(folder / "base.gguf", folder / "floor.gguf", 13, 3, 5, 0.3, /*evicted=*/true, form);
    expect_the_same_on_every_way(floored.open(), tokens, floored.reference(tokens), {150, 37, 1});
    const auto plain = converted.plain_reference(tokens);
    const auto model = converted.open(false);
    Engine engine(model, {2, {}, 256});
    for (const size_t piece : {size_t{150}, size_t{1}}) {
      Session session(model, exact());
      expect_equal(engine, session, tokens, plain, piece);
    }
  }
}

// What Gemma 3's metadata may say besides, each of which changes the logits: both engines read one table.
TEST(EngineAgainstLibtorch, MetadataBeyondTheDefaults) {
  const formats::TestFolder folder;
  auto metadata = small_metadata("gemma3");
  write_small_model(folder / "base.gguf", metadata);
  const auto tokens = narrow(small_tokens(150));
  const auto read = [&] { return Converted(folder / "base.gguf", folder / "a.gguf", 13, 3, 5, 0.3).plain_reference(tokens); };
  auto before = read();
  const auto changed = [&](const char* key, auto value) {
    SCOPED_TRACE(key);
    metadata.set(key, value);
    write_small_model(folder / "base.gguf", metadata);
    const Converted converted(folder / "base.gguf", folder / "adapter.gguf", 13, 3, 5, 0.3);
    const auto expected = converted.plain_reference(tokens);
    EXPECT_GT((expected - before).abs().max().item<double>(), 1e-3);
    before = expected;
    const auto model = converted.open(false);
    Engine engine(model, {2, {}, 256});
    Session session(model, exact());
    expect_equal(engine, session, tokens, expected, 150);
  };
  changed("gemma3.attention.scale", 0.4f);
  changed("gemma3.attention.sliding_window_pattern", uint32_t{2});
  changed("gemma3.rope.freq_base_swa", 300.0f);
  changed("gemma3.rope.freq_base", 1e5f);
  metadata.set("gemma3.rope.scaling.type", std::string("linear"));
  changed("gemma3.rope.scaling.factor", 4.0f);
  changed("gemma3.attention.sliding_window", uint32_t{0});  // no layer is local
}

// The table knows these and the engine doesn't: an error, not other logits.
TEST(EngineAgainstLibtorch, RefusesWhatItHasNoCodeFor) {
  const formats::TestFolder folder;
  const auto refusal = [&](const formats::GgufMetadata& metadata) {
    write_small_model(folder / "model.gguf", metadata);
    try {
      Model::open(folder / "model.gguf");
    } catch (const runtime::ModelError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  auto capped = small_metadata("gemma3");
  capped.set("gemma3.final_logit_softcapping", 30.0f);
  EXPECT_NE(refusal(capped).find("soft cap"), std::string::npos) << refusal(capped);
  EXPECT_NE(refusal(small_metadata("gemma2")).find("soft cap"), std::string::npos);
  auto endless = small_metadata("llama");
  endless.set("llama.context_length", uint32_t{1} << 30);
  EXPECT_NE(refusal(endless).find("a context of 1073741824"), std::string::npos) << refusal(endless);
  auto yarn = small_metadata("llama");
  yarn.set("llama.rope.scaling.type", std::string("yarn"));
  yarn.set("llama.rope.scaling.factor", 4.0f);
  EXPECT_NE(refusal(yarn).find("rotary scaling"), std::string::npos) << refusal(yarn);
}

std::vector<int32_t> text_tokens(const std::string& path, size_t count) {
  const formats::GgufFile file(path);
  const std::string text = formats::read_bytes(LATTE_SOURCE_DIR "/data/tinyshakespeare.txt").substr(0, 20 * count);
  auto tokens = narrow(formats::Tokenizer(file.metadata()).encode(text));
  tokens.resize(count);
  return tokens;
}

// SmolLM2's weights in float32, which take nothing away from its Q4_1, and an adapter beside each.
class SmolLM2Engine : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (formats::smollm2_path().empty()) return;
    folder_ = new formats::TestFolder;
    runtime::quantize_model(formats::smollm2_path(), *folder_ / "base.gguf", formats::TensorType::kF32);
    converted_ = new Converted(*folder_ / "base.gguf", *folder_ / "adapter.gguf", 48, 4, 16, 0.03);
  }
  static void TearDownTestSuite() {
    delete converted_;
    delete folder_;
  }
  void SetUp() override { LATTE_SKIP_WITHOUT(formats::smollm2_path()); }

  static formats::TestFolder* folder_;
  static Converted* converted_;
};
formats::TestFolder* SmolLM2Engine::folder_ = nullptr;
Converted* SmolLM2Engine::converted_ = nullptr;

TEST_F(SmolLM2Engine, EqualsTheLibtorchModel) {
  const auto tokens = text_tokens(formats::smollm2_path(), 160);
  expect_the_same_on_every_way(converted_->open(), tokens, converted_->reference(tokens), {160, 41});
}

TEST_F(SmolLM2Engine, UnconvertedEqualsTheLibtorchModel) {
  const auto tokens = text_tokens(formats::smollm2_path(), 96);
  const auto expected = converted_->plain_reference(tokens);
  const auto model = converted_->open(false);
  Engine engine(model, {2, {}, 128});
  Session session(model, exact());
  expect_equal(engine, session, tokens, expected, 64);
}

TEST_F(SmolLM2Engine, RandomSchedulesEqualEachSessionAlone) {
  expect_random_schedules_to_equal_each_alone(converted_->open(), text_tokens(formats::smollm2_path(), 1500),
                                              [&](const auto& tokens) { return converted_->reference(tokens); });
}

// KL(dequantised || quantised), mean over tokens, both by the engine and with half-precision states as in use.
double cost_of_quantised_products(const std::shared_ptr<const Model>& exact_model, const std::shared_ptr<const Model>& quantised,
                                  const std::vector<int32_t>& tokens) {
  double total = 0.0;
  Engine one(exact_model, {2, {}, 64}), two(quantised, {2, {}, 64});
  Session expected(exact_model), got(quantised);
  const int64_t vocabulary = exact_model->shape().vocab_size;
  for (size_t i = 0; i < tokens.size(); i += 64) {
    const auto some = std::span(tokens).subspan(i, std::min<size_t>(64, tokens.size() - i));
    const auto logits = [&](Engine& engine, Session& session) {
      const runtime::StepPart part{&session, some, true};
      const auto values = engine.step({&part, 1});
      return torch::from_blob(const_cast<float*>(values.data()), {static_cast<int64_t>(some.size()), vocabulary})
          .to(torch::kFloat64)
          .log_softmax(-1);
    };
    const auto p = logits(one, expected), q = logits(two, got);
    total += (p.exp() * (p - q)).sum().item<double>();
  }
  return total / static_cast<double>(tokens.size());
}

TEST_F(SmolLM2Engine, QuantisedIsCloseToItsDequantisedRun) {
  const auto tokens = text_tokens(formats::smollm2_path(), 192);
  for (const char* type : {"q4_1", "bf16"}) {
    const std::string file = *folder_ / "quantised.gguf", whole = *folder_ / "whole.gguf";
    runtime::quantize_model(*folder_ / "base.gguf", file, *formats::tensor_type_named(type));
    runtime::quantize_model(file, whole, formats::TensorType::kF32);
    for (const bool convert : {false, true}) {
      runtime::ModelOptions options, exact_options;
      if (convert) {
        options.adapter = *folder_ / "one.gguf";
        exact_options.adapter = *folder_ / "two.gguf";
        converted_->write(file, options.adapter);
        converted_->write(whole, exact_options.adapter);
      }
      const double kl = cost_of_quantised_products(Model::open(whole, exact_options), Model::open(file, options), tokens);
      EXPECT_LT(kl, kQuantised) << type << (convert ? ", converted" : "");
      std::printf("KL to the dequantised run, %s%s: %.2e\n", type, convert ? ", converted" : "", kl);
    }
  }
}

TEST(Gemma3Engine, QuantisedIsCloseToItsDequantisedRun) {
  const std::string path = formats::gemma3_path();
  LATTE_SKIP_WITHOUT(path);
  const formats::TestFolder folder;
  runtime::quantize_model(path, folder / "whole.gguf", formats::TensorType::kF32);
  const double kl = cost_of_quantised_products(Model::open(folder / "whole.gguf"), Model::open(path), text_tokens(path, 96));
  EXPECT_LT(kl, kQuantised);
  std::printf("KL to the dequantised run: %.2e\n", kl);
}

}  // namespace
}  // namespace latte
