#include "train/plot.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace latte::train {
namespace {

// A curve of more points than pixels says nothing more: each point is the mean of a stretch of steps.
constexpr size_t kPoints = 300;

void add_data(std::ostream& script, size_t index, const std::vector<StepMetrics>& metrics) {
  script << "$train" << index << " << END_OF_DATA\n";
  const size_t stretch = (metrics.size() + kPoints - 1) / kPoints;
  for (size_t begin = 0; begin < metrics.size(); begin += stretch) {
    const size_t end = std::min(metrics.size(), begin + stretch);
    double sum = 0.0;
    for (size_t i = begin; i < end; ++i) sum += metrics[i].loss;
    script << metrics[end - 1].step << ' ' << sum / static_cast<double>(end - begin) << '\n';
  }
  script << "END_OF_DATA\n$val" << index << " << END_OF_DATA\n";
  for (const StepMetrics& step : metrics) {
    if (step.val_loss) script << step.step << ' ' << *step.val_loss << '\n';
  }
  script << "END_OF_DATA\n";
}

std::string make_script(const std::vector<Curve>& curves, const std::string& svg, const std::string& png) {
  std::ostringstream script;
  std::string plot;
  for (size_t i = 0; i < curves.size(); ++i) {
    add_data(script, i, curves[i].metrics);
    const std::string number = std::to_string(i), colour = " lc " + std::to_string(i + 1);
    const std::string title = curves[i].title.empty() ? "" : curves[i].title + ", ";
    plot +=
        (i > 0 ? ", " : "plot ") + ("$train" + number) + " with lines lw 1" + colour + " title " + in_quotes(title + "training");
    const auto& metrics = curves[i].metrics;
    if (std::any_of(metrics.begin(), metrics.end(), [](const StepMetrics& step) { return step.val_loss.has_value(); })) {
      plot +=
          ", $val" + number + " with linespoints lw 2 pt 7 ps 0.6 dt 2" + colour + " title " + in_quotes(title + "validation");
    }
  }
  script << "set xlabel 'step'\nset ylabel 'loss (nats a token)'\nset grid\nset key top right noenhanced\n"
         << "set terminal svg size 800,500 dynamic background 'white'\nset output " << in_quotes(svg) << '\n'
         << plot << "\nset terminal pngcairo size 800,500\nset output " << in_quotes(png) << '\n'
         << plot << "\nset output\n";
  return script.str();
}

}  // namespace

std::string plot_losses(const std::vector<Curve>& curves, const std::string& prefix, formats::FileOperations& operations) {
  const bool empty = std::all_of(curves.begin(), curves.end(), [](const Curve& curve) { return curve.metrics.empty(); });
  if (empty) return {};
  return draw(
      "loss curve", prefix, [&](const std::string& svg, const std::string& png) { return make_script(curves, svg, png); },
      operations);
}

}  // namespace latte::train
