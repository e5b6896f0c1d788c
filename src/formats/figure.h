// Figures by gnuplot, whatever they show: callers bring the script.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "formats/atomic_file.h"

namespace latte::formats {

// `text` as a string in a gnuplot script.
std::string in_quotes(std::string_view text);

// Runs gnuplot on the script that `script` makes for two files, and writes what it drew as `prefix`.svg and `prefix`.png, so that
// each is whole or the one before. Returns why gnuplot didn't draw `what`, as one line, or nothing. Throws FileError where the
// disk doesn't take it.
std::string draw(const std::string& what, const std::string& prefix,
                 const std::function<std::string(const std::string& svg, const std::string& png)>& script,
                 FileOperations& operations = FileOperations::system());

}  // namespace latte::formats
