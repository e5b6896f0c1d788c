#include "extend/plot.h"

#include <algorithm>
#include <sstream>

#include "train/plot.h"

namespace latte::extend {
namespace {

std::string make_script(const std::vector<TextRow>& rows, const std::string& svg, const std::string& png) {
  std::vector<AttentionKind> kinds;
  for (const TextRow& row : rows) {
    if (std::find(kinds.begin(), kinds.end(), row.attention) == kinds.end()) kinds.push_back(row.attention);
  }
  std::ostringstream script;
  for (size_t i = 0; i < kinds.size(); ++i) {
    script << "$rows" << i << " << END_OF_DATA\n";
    for (const TextRow& row : rows) {
      if (row.attention == kinds[i])
        script << row.length << ' ' << row.perplexity << ' ' << row.seconds << ' ' << row.state_bytes / 1e6 << '\n';
    }
    script << "END_OF_DATA\n";
  }
  const auto lines = [&](int column, bool titles) {
    std::string plot = "plot ";
    for (size_t i = 0; i < kinds.size(); ++i) {
      const std::string title = titles ? "title " + train::in_quotes(name_of(kinds[i])) : "notitle";
      plot += (i > 0 ? ", " : "") + ("$rows" + std::to_string(i)) + " using 1:" + std::to_string(column) +
              " with linespoints lw 2 pt 7 ps 0.6 lc " + std::to_string(i + 1) + " " + title;
    }
    return plot + "\n";
  };
  // The names stand beside the panels: in one they would lie over its lines.
  const std::string panels = "set multiplot layout 1,3 margins 0.05,0.83,0.14,0.96 spacing 0.055,0\nset ylabel 'perplexity'\n" +
                             lines(2, false) + "set ylabel 'seconds to read'\n" + lines(3, false) + "set ylabel 'state (MB)'\n" +
                             lines(4, true) + "unset multiplot\n";
  script << "set xlabel 'tokens'\nset logscale xy 2\nset grid\nset key at screen 0.995,0.96 right top noenhanced\n"
         << "set terminal svg size 1700,500 dynamic background 'white'\nset output " << train::in_quotes(svg) << '\n'
         << panels << "set terminal pngcairo size 1700,500\nset output " << train::in_quotes(png) << '\n'
         << panels << "set output\n";
  return script.str();
}

}  // namespace

std::string plot_rows(const std::vector<TextRow>& rows, const std::string& prefix) {
  if (rows.empty()) return {};
  return train::draw("figure", prefix,
                     [&](const std::string& svg, const std::string& png) { return make_script(rows, svg, png); });
}

}  // namespace latte::extend
