// How libtorch says that memory has run out: its exceptions have no type for it.
#pragma once

#include <string_view>

namespace latte::train {

// Whether an exception's text is that of torch's allocator, or what oneDNN says where it can't get what a primitive needs (and no
// more; of what it doesn't support it says which).
inline bool tells_of_memory(std::string_view text) {
  return text.find("can't allocate memory") != std::string_view::npos || text == "could not create a primitive";
}

}  // namespace latte::train
