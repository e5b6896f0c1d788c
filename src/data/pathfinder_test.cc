#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "data/tasks.h"
#include "data/test_tasks.h"
#include "formats/error.h"
#include "formats/test_files.h"

namespace latte {
namespace {

TaskOptions paths_of_six(int64_t images, int64_t distractors) {
  TaskOptions options = TaskOptions::defaults("pathfinder");
  options.train = images;
  options.validation = options.test = 1;
  options.contour_length = 6;
  options.distractors = distractors;
  return options;
}

TEST(Pathfinder, GreyIsRoundedToLevels) {
  TaskOptions options = TaskOptions::defaults("pathfinder");
  options.size = 16;
  options.contour_length = 2;
  options.distractors = 0;
  options.train = options.validation = options.test = 5;
  const TaskData fine = make_pathfinder(options);
  options.levels = 4;
  const TaskData coarse = make_pathfinder(options);
  coarse.check("pathfinder");
  EXPECT_EQ(coarse.vocab_size, 4);
  const auto& pixels = fine.splits.at("train").tokens;
  EXPECT_TRUE(at::equal(coarse.splits.at("train").tokens, (pixels.to(at::kLong) * 4).div(256, "floor").to(at::kByte)));
  EXPECT_TRUE(at::equal(coarse.splits.at("train").labels, fine.splits.at("train").labels));
}

// The pixels of one of two dots' colours: Pathfinder's images can be checked by walking along what is lit.
TEST(Pathfinder, ImagesOfBothLabelsAreDrawnAlike) {
  TaskOptions options = paths_of_six(400, /*distractors=*/2);
  const TaskData data = make_pathfinder(options);
  data.check("pathfinder");
  const TaskExamples& split = data.splits.at("train");
  double light[2] = {0, 0};
  int64_t count[2] = {0, 0};
  for (int64_t i = 0; i < 400; ++i) {
    const auto pixels = tokens_of(split, i);
    ASSERT_EQ(pixels.size(), 1024U);
    const auto label = static_cast<size_t>(split.labels[i].item<int32_t>());
    light[label] += std::accumulate(pixels.begin(), pixels.end(), 0.0) / 1024;
    ++count[label];
    // Two dots are lit through and through; dashes never are as wide.
    int64_t bright = 0;
    for (const int32_t pixel : pixels) bright += pixel == 255 ? 1 : 0;
    EXPECT_GE(bright, 2);
  }
  EXPECT_GT(count[0], 150);
  EXPECT_GT(count[1], 150);
  // What is lit tells nothing of the label: the means differ by less than four of their deviations.
  EXPECT_NEAR(light[0] / static_cast<double>(count[0]), light[1] / static_cast<double>(count[1]), 2.0);
  options.contour_length = 64;
  options.size = 16;
  EXPECT_CONTAINS(formats::error_text<formats::OptionError>([&] { make_pathfinder(options); }), "contour_length is 64");
}

// Whether the two dots (pixels of 255) are joined by lit pixels, each within `reach` of the next.
bool dots_are_joined(const std::vector<int32_t>& pixels, int64_t side, double reach) {
  constexpr int32_t kLit = 120;
  std::vector<std::pair<int64_t, int64_t>> lit;
  std::vector<bool> dot;
  for (int64_t i = 0; i < side * side; ++i) {
    if (pixels[static_cast<size_t>(i)] < kLit) continue;
    lit.emplace_back(i % side, i / side);
    dot.push_back(pixels[static_cast<size_t>(i)] == 255);
  }
  const auto apart = [&](size_t a, size_t b) {
    return std::hypot(static_cast<double>(lit[a].first - lit[b].first), static_cast<double>(lit[a].second - lit[b].second));
  };
  const size_t first = static_cast<size_t>(std::find(dot.begin(), dot.end(), true) - dot.begin());
  std::vector<bool> reached(lit.size());
  std::vector<size_t> from = {first};
  reached[first] = true;
  while (!from.empty()) {
    const size_t at = from.back();
    from.pop_back();
    for (size_t to = 0; to < lit.size(); ++to) {
      if (reached[to] || apart(at, to) > reach) continue;
      reached[to] = true;
      from.push_back(to);
    }
  }
  for (size_t i = 0; i < lit.size(); ++i) {
    if (dot[i] && apart(first, i) > 4.0 && reached[i]) return true;  // of the other dot
  }
  return false;
}

// Walking from lit pixel to lit pixel finds the way along a path (dashes lie 1.2 pixels apart, from edge to edge), and in one
// image of four from one path to another (whose middles lie 2.2 pixels apart at least).
TEST(Pathfinder, LabelsSayWhetherAPathJoinsTheDots) {
  const TaskOptions options = paths_of_six(300, /*distractors=*/0);
  const TaskExamples split = make_pathfinder(options).splits.at("train");
  int64_t joined[2] = {0, 0}, count[2] = {0, 0};
  for (int64_t i = 0; i < options.train; ++i) {
    const auto label = static_cast<size_t>(split.labels[i].item<int32_t>());
    joined[label] += dots_are_joined(tokens_of(split, i), options.size, 2.9) ? 1 : 0;
    ++count[label];
  }
  EXPECT_GE(joined[1], count[1] * 94 / 100);
  EXPECT_LE(joined[0], count[0] * 30 / 100);
}

double mean_light(const TaskOptions& options) {
  return make_pathfinder(options).splits.at("train").tokens.to(at::kDouble).mean().item<double>();
}

// The sizes of Long Range Arena: two paths of 14 dashes, so many distractors, each as bright as the others.
TEST(Pathfinder, PublishedSizesHaveAllTheirDistractors) {
  for (const auto& [size, distractors] : {std::pair{int64_t{32}, int64_t{6}}, {int64_t{128}, int64_t{25}}}) {
    SCOPED_TRACE(size);
    TaskOptions options = paths_of_six(size == 32 ? 40 : 12, 0);
    options.size = size;
    options.contour_length = 14;
    options.validation = options.test = 1;
    const double none = mean_light(options);
    options.distractors = distractors;
    make_pathfinder(options).check("pathfinder");
    // A distractor has 4 dashes, the two paths 28, and the dots come on top.
    const double each = (mean_light(options) - none) / static_cast<double>(distractors);
    EXPECT_GT(each, 0.6 * none / 7);
    EXPECT_LT(each, 1.2 * none / 7);
  }
}

}  // namespace
}  // namespace latte
