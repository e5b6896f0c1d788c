#include "cli/latte_bench_plot.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>
#include <vector>

#include "formats/figure.h"

namespace latte::cli {
namespace {

struct Line {
  std::string title;
  std::vector<std::string> points;  // "depth decode prefill"
};

std::vector<Line> LinesOf(const nlohmann::json& rows) {
  std::vector<Line> lines;
  for (const nlohmann::json& row : rows) {
    if (!row.contains("decode_tokens_per_second") || !row.contains("prefill_tokens_per_second")) continue;  // batches, sessions
    const std::string title = row.at("engine").get<std::string>() + " " + row.at("attention").get<std::string>() + " " +
                              row.at("type").get<std::string>();
    auto line = std::find_if(lines.begin(), lines.end(), [&](const Line& l) { return l.title == title; });
    if (line == lines.end()) line = lines.insert(line, {title, {}});
    std::ostringstream point;
    // The axis is logarithmic: depth 0 stands at its left end.
    point << std::max<int64_t>(256, row.at("depth").get<int64_t>()) << ' ' << row.at("decode_tokens_per_second").get<double>()
          << ' ' << row.at("prefill_tokens_per_second").get<double>();
    line->points.push_back(point.str());
  }
  return lines;
}

std::string MakeScript(const std::vector<Line>& lines, const std::string& svg, const std::string& png) {
  std::ostringstream script;
  for (size_t i = 0; i < lines.size(); ++i) {
    script << "$rows" << i << " << END_OF_DATA\n";
    for (const std::string& point : lines[i].points) script << point << '\n';
    script << "END_OF_DATA\n";
  }
  const auto plot = [&](int column, bool titles) {
    std::string text = "plot ";
    for (size_t i = 0; i < lines.size(); ++i) {
      text += (i > 0 ? ", " : "") + ("$rows" + std::to_string(i)) + " using 1:" + std::to_string(column) +
              " with linespoints lw 2 pt 7 ps 0.6 lc " + std::to_string(i + 1) + " " +
              (titles ? "title " + formats::in_quotes(lines[i].title) : "notitle");
    }
    return text + "\n";
  };
  const std::string panels = "set multiplot layout 1,2\nset ylabel 'tokens a second, writing'\n" + plot(2, true) +
                             "set ylabel 'tokens a second, reading'\n" + plot(3, false) + "unset multiplot\n";
  script << "set xlabel 'depth (tokens read before)'\nset logscale x 2\nset xtics 1024,4\nset xtics add ('0' 256)\nset logscale "
            "y 10\nset grid\n"
         << "set key bottom left noenhanced\nset terminal svg size 1200,500 dynamic background 'white'\nset output "
         << formats::in_quotes(svg) << '\n'
         << panels << "set terminal pngcairo size 1200,500\nset output " << formats::in_quotes(png) << '\n'
         << panels << "set output\n";
  return script.str();
}

}  // namespace

std::string PlotDecode(const nlohmann::json& result, const std::string& prefix) {
  const std::vector<Line> lines = LinesOf(result.at("rows"));
  if (lines.empty()) return "no figure: no row has both speeds";
  return formats::draw("figure", prefix,
                       [&](const std::string& svg, const std::string& png) { return MakeScript(lines, svg, png); });
}

}  // namespace latte::cli
