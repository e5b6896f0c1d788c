// Figures by gnuplot, whatever they show: callers bring the script.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace latte::formats {

// `text` as a string in a gnuplot script.
std::string in_quotes(std::string_view text);

// Runs gnuplot on the script that `script` makes for two files, then moves them to `prefix`.svg and `prefix`.png, so that a
// figure is whole or the one before. Returns what went wrong with `what`, as one line, or nothing.
std::string draw(const std::string& what, const std::string& prefix,
                 const std::function<std::string(const std::string& svg, const std::string& png)>& script);

}  // namespace latte::formats
