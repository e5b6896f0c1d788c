// What the frozen original says of a stretch of text, kept in files: runs that read the same stretches (a control, another
// window) skip its forward pass.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>

namespace latte::extend {

class TeacherCache {
 public:
  // Makes the folder. `model` and `dtype` tell originals apart. Throws formats::FileError.
  TeacherCache(std::string folder, std::string model, std::string dtype);

  // The hidden vectors [B T, E] of tokens int64 [B, T], as compute() gives them: read from the file of these tokens, or computed
  // and written to it. A damaged file counts as none. Throws formats::FileError where one can't be opened or written.
  at::Tensor get(const at::Tensor& tokens, const std::function<at::Tensor()>& compute) const;

 private:
  std::string folder_, model_, dtype_;
};

}  // namespace latte::extend
