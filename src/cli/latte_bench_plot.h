// The figure of latte bench decode.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace latte::cli {

// Tokens a second at writing and reading over the depth, a line for each engine, attention and type, as `prefix`.svg and
// `prefix`.png. Returns what went wrong, as one line, or nothing.
std::string PlotDecode(const nlohmann::json& result, const std::string& prefix);

}  // namespace latte::cli
