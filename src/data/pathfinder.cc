// Pathfinder (Linsley et al., arXiv 1805.08315; Long Range Arena, arXiv 2011.04006): an image with two long dashed paths, short
// dashed distractors and two dots. The label says whether one path joins the dots. The dots' distance tells nothing: both kinds
// of image are drawn alike, the second path begins as far from the first's beginning as the first's end lies, and only the place
// of one dot differs.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numbers>
#include <optional>
#include <utility>
#include <vector>

#include "data/generate.h"
#include "data/tasks.h"

namespace latte {
namespace {

struct Point {
  double x = 0.0, y = 0.0;
};

double distance(Point a, Point b) { return std::hypot(a.x - b.x, a.y - b.y); }

// Of a point to the dash from a to b.
double distance_to_dash(Point p, Point a, Point b) {
  const double dx = b.x - a.x, dy = b.y - a.y, square = dx * dx + dy * dy;
  const double along = square > 0 ? std::clamp(((p.x - a.x) * dx + (p.y - a.y) * dy) / square, 0.0, 1.0) : 0.0;
  return distance(p, {a.x + along * dx, a.y + along * dy});
}

using Path = std::vector<std::pair<Point, Point>>;  // dashes

// Sizes in pixels, of an image of 32 pixels a side; larger images have more room and finer lines.
struct Shape {
  explicit Shape(const TaskOptions& options) : size(static_cast<double>(options.size)) {
    const double scale = std::sqrt(size / 32.0);
    // Dashes of long paths are shorter, so that two of them find room: 14 at 32 pixels.
    constexpr double kLongest = 1.1;  // of a path, in sides of the image
    const double shrink = std::min(1.0, kLongest * size / (3.2 * scale * static_cast<double>(options.contour_length)));
    dash = 2.0 * scale * shrink;
    gap = 1.2 * scale * shrink;
    radius = 0.45 * scale;
    dot = 1.3 * scale;
    room = 2.2 * scale;
  }
  double size, dash, gap, radius, dot;
  double room;  // between two paths
};

constexpr double kTurn = 0.5;  // radians from a dash to the next, at most

class Canvas {
 public:
  explicit Canvas(const Shape& shape) : shape_(shape) {}

  // A path of `dashes` from `start`, if there is room for it.
  std::optional<Path> grow(RandomStream& random, Point start, int64_t dashes) const {
    Path path;
    double angle = random.uniform(0.0, 2.0 * std::numbers::pi);
    Point at = start;
    for (int64_t i = 0; i < dashes; ++i) {
      constexpr int kTurns = 4;  // tries
      bool placed = false;
      for (int turn = 0; turn < kTurns && !placed; ++turn) {
        const double next = i == 0 ? angle : angle + random.uniform(-kTurn, kTurn);
        const Point end = {at.x + shape_.dash * std::cos(next), at.y + shape_.dash * std::sin(next)};
        if (!inside(end) || !is_free(at, end) || crosses(path, at, end)) continue;
        path.emplace_back(at, end);
        angle = next;
        at = {end.x + shape_.gap * std::cos(next), end.y + shape_.gap * std::sin(next)};
        placed = true;
      }
      if (!placed) return std::nullopt;
    }
    return path;
  }

  void add(Path path) { paths_.push_back(std::move(path)); }

  bool inside(Point p) const {
    const double margin = shape_.dot + 0.5;
    return p.x >= margin && p.y >= margin && p.x <= shape_.size - margin && p.y <= shape_.size - margin;
  }

  // Grey, 0 to 255, anti-aliased, brightest where lines and dots are.
  std::vector<int32_t> draw(Point dot_a, Point dot_b) const {
    const auto side = static_cast<int64_t>(shape_.size);
    std::vector<int32_t> pixels(static_cast<size_t>(side * side));
    const auto cover = [&](double distance, double radius, int64_t x, int64_t y) {
      auto& pixel = pixels[static_cast<size_t>(y * side + x)];
      pixel = std::max(pixel, static_cast<int32_t>(std::lround(255.0 * std::clamp(radius + 0.5 - distance, 0.0, 1.0))));
    };
    const auto near = [&](Point a, Point b, double reach, const auto& visit) {
      const auto low = [&](double v) { return std::max<int64_t>(0, static_cast<int64_t>(std::floor(v - reach - 1))); };
      const auto high = [&](double v) { return std::min<int64_t>(side - 1, static_cast<int64_t>(std::ceil(v + reach + 1))); };
      for (int64_t y = low(std::min(a.y, b.y)); y <= high(std::max(a.y, b.y)); ++y) {
        for (int64_t x = low(std::min(a.x, b.x)); x <= high(std::max(a.x, b.x)); ++x) {
          visit(x, y, Point{static_cast<double>(x) + 0.5, static_cast<double>(y) + 0.5});
        }
      }
    };
    for (const Path& path : paths_) {
      for (const auto& [a, b] : path) {
        near(a, b, shape_.radius, [&, from = a, to = b](int64_t x, int64_t y, Point centre) {
          cover(distance_to_dash(centre, from, to), shape_.radius, x, y);
        });
      }
    }
    for (const Point dot : {dot_a, dot_b}) {
      near(dot, dot, shape_.dot, [&](int64_t x, int64_t y, Point centre) { cover(distance(centre, dot), shape_.dot, x, y); });
    }
    return pixels;
  }

 private:
  bool is_free(Point a, Point b) const {
    const Point middle = {(a.x + b.x) / 2, (a.y + b.y) / 2};
    for (const Path& path : paths_) {
      for (const auto& [from, to] : path) {
        for (const Point p : {a, middle, b}) {
          if (distance_to_dash(p, from, to) < shape_.room) return false;
        }
      }
    }
    return true;
  }

  // A path keeps off itself, the last dashes aside.
  bool crosses(const Path& path, Point a, Point b) const {
    constexpr size_t kNeighbours = 2;
    for (size_t i = 0; i + kNeighbours < path.size(); ++i) {
      for (const Point p : {a, b}) {
        if (distance_to_dash(p, path[i].first, path[i].second) < shape_.room) return true;
      }
    }
    return false;
  }

  const Shape& shape_;
  std::vector<Path> paths_;
};

class Generator {
 public:
  explicit Generator(const TaskOptions& options) : options_(options), shape_(options) {}

  Example operator()(RandomStream& random) const {
    constexpr int kMostImages = 100'000;
    constexpr int64_t kMostPlacements = 2'000'000;  // of distractors: some seconds
    int64_t placements = 0;
    for (int i = 0; i < kMostImages && placements < kMostPlacements; ++i) {
      if (auto example = draw(random, placements)) return std::move(*example);
    }
    throw formats::OptionError("contour_length is " + std::to_string(options_.contour_length) + " and distractors is " +
                               std::to_string(options_.distractors) + ", expected paths that fit into " +
                               std::to_string(options_.size) + " pixels a side");
  }

 private:
  Point anywhere(RandomStream& random) const { return {random.uniform(0.0, shape_.size), random.uniform(0.0, shape_.size)}; }

  std::optional<Example> draw(RandomStream& random, int64_t& placements) const {
    Canvas canvas(shape_);
    const auto first = canvas.grow(random, anywhere(random), options_.contour_length);
    if (!first || !canvas.inside(first->front().first)) return std::nullopt;
    canvas.add(*first);
    const Point begin = first->front().first, end = first->back().second;
    const double apart = distance(begin, end);
    std::optional<Path> second;
    constexpr int kTries = 20;
    for (int i = 0; i < kTries && !second; ++i) {
      const double angle = random.uniform(0.0, 2.0 * std::numbers::pi), far = apart * random.uniform(0.95, 1.05);
      const Point start = {begin.x + far * std::cos(angle), begin.y + far * std::sin(angle)};
      if (canvas.inside(start)) second = canvas.grow(random, start, options_.contour_length);
    }
    if (!second) return std::nullopt;
    canvas.add(*second);
    const int64_t shorter = std::max<int64_t>(1, options_.contour_length / 3);
    int64_t placed = 0;
    for (int64_t tries = 0; placed < options_.distractors && tries < 50 * options_.distractors; ++tries) {
      const Point start = anywhere(random);
      ++placements;
      if (!canvas.inside(start)) continue;
      if (auto path = canvas.grow(random, start, shorter)) {
        canvas.add(std::move(*path));
        ++placed;
      }
    }
    if (placed < options_.distractors) return std::nullopt;
    Example example;
    example.label = static_cast<int32_t>(random.below(2));
    example.tokens = canvas.draw(begin, example.label == 1 ? end : second->front().first);
    for (int32_t& pixel : example.tokens) pixel = static_cast<int32_t>(pixel * options_.levels / 256);
    return example;
  }

  const TaskOptions& options_;
  Shape shape_;
};

}  // namespace

TaskData make_pathfinder(const TaskOptions& options) {
  const Generator generator(options);
  TaskData data{.name = options.name, .kind = TaskKind::kClassify, .vocab_size = options.levels, .num_classes = 2};
  uint64_t number = 0;
  for (const auto& [name, count] :
       {std::pair{"train", options.train}, {"validation", options.validation}, {"test", options.test}}) {
    data.splits.emplace(name, make_split(count, static_cast<uint64_t>(options.seed), number++, generator));
  }
  return data;
}

}  // namespace latte
