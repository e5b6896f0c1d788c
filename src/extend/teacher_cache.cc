#include "extend/teacher_cache.h"

#include <cerrno>
#include <filesystem>
#include <utility>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/safetensors.h"
#include "train/training_checkpoint.h"

namespace latte::extend {
namespace {

constexpr const char* kHidden = "hidden";

}  // namespace

TeacherCache::TeacherCache(std::string folder, std::string model, std::string dtype)
    : folder_(std::move(folder)), model_(std::move(model)), dtype_(std::move(dtype)) {
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (error) throw formats::FileError("make", folder_, error.value());
}

at::Tensor TeacherCache::get(const at::Tensor& tokens, const std::function<at::Tensor()>& compute) const {
  const auto read = tokens.contiguous();
  formats::Hash hash;
  hash.add(std::string_view(model_));
  hash.add(std::string_view(dtype_));
  hash.add(static_cast<uint64_t>(read.size(0)));
  hash.add({reinterpret_cast<const std::byte*>(read.const_data_ptr<int64_t>()), read.nbytes()});
  const std::string path = (std::filesystem::path(folder_) / (hash.digits() + ".safetensors")).string();
  try {
    const formats::SafetensorsFile file(path);
    const auto& stored = file.at(kHidden);
    const bool narrow = stored.dtype == formats::DType::kBFloat16;
    if (stored.shape.size() == 2 && stored.shape[0] == read.numel() && (narrow || stored.dtype == formats::DType::kFloat32)) {
      auto hidden = torch::empty(stored.shape, narrow ? torch::kBFloat16 : torch::kFloat32);
      train::copy_from(file, kHidden, hidden);
      return hidden;
    }
  } catch (const formats::FileError& error) {
    if (error.error_number() != ENOENT) throw;
  } catch (const formats::FormatError&) {  // cut short by a full disk, say: it is made again
  }
  const auto hidden = compute().contiguous();
  formats::write_safetensors(path, {{train::view_of(kHidden, hidden)}});
  return hidden;
}

}  // namespace latte::extend
