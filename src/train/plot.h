// Figures by gnuplot: loss curves, and whatever else has a script.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "train/metrics.h"

namespace latte::train {

struct Curve {
  std::string title;
  std::vector<StepMetrics> metrics;
};

// `text` as a string in a gnuplot script.
std::string in_quotes(std::string_view text);

// Runs gnuplot on the script that `script` makes for two files, then moves them to `prefix`.svg and `prefix`.png, so that a
// figure is whole or the one before. Returns what went wrong with `what`, as one line, or nothing.
std::string draw(const std::string& what, const std::string& prefix,
                 const std::function<std::string(const std::string& svg, const std::string& png)>& script);

// Draws training and validation losses over steps as `prefix`.svg and `prefix`.png. Returns what went wrong, as one line that
// says how to mend it, or nothing: a missing curve is no reason to stop.
std::string plot_losses(const std::vector<Curve>& curves, const std::string& prefix);

}  // namespace latte::train
