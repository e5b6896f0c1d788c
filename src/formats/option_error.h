#pragma once

#include <stdexcept>

namespace latte::formats {

// An option that can't be: one line that names it, what it holds and what it may.
class OptionError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace latte::formats
