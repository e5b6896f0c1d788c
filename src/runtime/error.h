// The errors of this rung, beside those of formats. Their texts are one line each.
#pragma once

#include <stdexcept>

namespace latte::runtime {

// A model that this engine can't run, though it may be one: soft caps, YaRN, a type of weights, an adapter without its base.
// (What is no model at all is formats::FormatError.)
class ModelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// More memory than there is was asked for; nothing was allocated.
class MemoryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A session that can't do what it was asked for: it is full, or holds no past to go back to; a token that isn't one.
class SessionError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A saved state that this model can't continue: damaged, of another version, model or shape.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace latte::runtime
