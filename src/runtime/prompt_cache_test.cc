#include "runtime/prompt_cache.h"

#include <gtest/gtest.h>

#include "runtime/engine.h"
#include "runtime/error.h"
#include "runtime/test_tiny_model.h"

namespace latte::runtime {
namespace {

using Tokens = std::vector<int32_t>;

class PromptCacheTest : public ::testing::Test {
 protected:
  PromptCacheTest() {
    ModelOptions options;
    options.threads = 1;
    options.adapter = tiny_.adapter();
    model_ = Model::open(tiny_.path(), options);
    engine_.emplace(model_, EngineOptions{1, {}, 16});
  }
  Session read(const Tokens& tokens) {
    SessionOptions options;
    options.context = 64;
    Session session(model_, options);
    engine_->prefill(session, tokens);
    return session;
  }
  int64_t known(PromptCache& cache, const Tokens& tokens) {
    const auto found = cache.longest(tokens);
    return found ? found->position() : 0;
  }

  TinyModel tiny_;
  std::shared_ptr<const Model> model_;
  std::optional<Engine> engine_;
};

TEST_F(PromptCacheTest, FindsTheLongestBeginning) {
  PromptCache cache(model_);
  for (const Tokens& tokens : {Tokens{1, 2, 3, 4}, Tokens{1, 2}, Tokens{1, 2, 3, 4, 5, 6}, Tokens{1, 2, 9}, Tokens{7}}) {
    cache.put(tokens, read(tokens));
  }
  EXPECT_EQ(cache.entries(), 5U);
  EXPECT_EQ(known(cache, {1, 2, 3, 4, 5, 6, 7, 8}), 6);
  EXPECT_EQ(known(cache, {1, 2, 3, 4, 5, 6}), 4) << "a token is left to read";
  EXPECT_EQ(known(cache, {1, 2, 3, 9, 9}), 2);
  EXPECT_EQ(known(cache, {1, 2, 9, 9}), 3);
  EXPECT_EQ(known(cache, {7, 7}), 1);
  EXPECT_EQ(known(cache, {1, 3}), 0);
  EXPECT_EQ(known(cache, {}), 0);
  cache.put(Tokens{7}, read({7}));
  EXPECT_EQ(cache.entries(), 5U);
  EXPECT_THROW(cache.put(Tokens{7, 8}, read({7})), SessionError);
}

TEST_F(PromptCacheTest, ContinuesAsIfItHadReadAll) {
  PromptCache cache(model_);
  const Tokens tokens = tiny_.tokens(40);
  cache.put(std::span(tokens).first(25), read({tokens.begin(), tokens.begin() + 25}));
  auto session = cache.longest(tokens);
  ASSERT_TRUE(session);
  const auto logits = engine_->prefill(*session, std::span(tokens).subspan(25));
  const std::vector<float> got(logits.begin(), logits.end());
  Session whole = read({tokens.begin(), tokens.end() - 1});
  const auto expected = engine_->decode(whole, tokens.back());
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(got[i] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  EXPECT_LT(std::sqrt(difference / norm), 1e-3);
}

TEST_F(PromptCacheTest, MovesToDiskAndForgets) {
  const uint64_t size = read({1}).bytes();
  PromptCacheOptions options;
  options.memory_bytes = 2 * size;
  options.disk_bytes = 2 * size;
  formats::TestFolder folder;
  options.folder = std::filesystem::path(folder / "x").parent_path().string();
  {
    PromptCache cache(model_, options);
    for (int32_t i = 0; i < 12; ++i) {
      const Tokens tokens(static_cast<size_t>(30), i);
      cache.put(tokens, read(tokens));
      EXPECT_LE(cache.memory_used(), options.memory_bytes);
      EXPECT_LE(cache.disk_used(), options.disk_bytes);
    }
    EXPECT_FALSE(folder.names().empty());
    EXPECT_LT(cache.entries(), 12U);
    int found = 0;
    for (int32_t i = 0; i < 12; ++i) found += known(cache, Tokens(31, i)) == 30 ? 1 : 0;
    EXPECT_EQ(static_cast<size_t>(found), cache.entries());
    // Files that vanish are forgotten, not an error.
    for (const std::string& name : folder.names()) std::filesystem::remove(folder / name);
    for (int32_t i = 0; i < 12; ++i) known(cache, Tokens(31, i));
    EXPECT_EQ(cache.disk_used(), 0U);
  }
  EXPECT_TRUE(folder.names().empty());
}

}  // namespace
}  // namespace latte::runtime
