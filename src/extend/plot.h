// What `latte eval --plot` draws.
#pragma once

#include <string>
#include <vector>

#include "extend/evaluate.h"

namespace latte::extend {

// Perplexity and seconds against length, a line for each kind of attention, as `prefix`.svg and `prefix`.png. Returns what went
// wrong, as one line, or nothing.
std::string plot_rows(const std::vector<TextRow>& rows, const std::string& prefix);

}  // namespace latte::extend
