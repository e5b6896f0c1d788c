// Loss curves.
#pragma once

#include <string>
#include <vector>

#include "formats/figure.h"
#include "train/metrics.h"

namespace latte::train {

struct Curve {
  std::string title;
  std::vector<StepMetrics> metrics;
};

using formats::draw;
using formats::in_quotes;

// Draws training and validation losses over steps as `prefix`.svg and `prefix`.png. Returns what went wrong, as one line that
// says how to mend it, or nothing: a missing curve is no reason to stop.
std::string plot_losses(const std::vector<Curve>& curves, const std::string& prefix,
                        formats::FileOperations& operations = formats::FileOperations::system());

}  // namespace latte::train
