// A run's folder, held by one process at a time.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace latte::train {

class RunFolder {
 public:
  // Makes the folder where it isn't there, and removes what a process that was killed while it wrote a checkpoint left behind.
  // Throws formats::FileError, and std::runtime_error where another process holds the folder.
  explicit RunFolder(const std::string& path);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  std::string operator/(std::string_view name) const { return (path_ / name).string(); }
  std::string checkpoint() const;
  std::string name() const { return path_.lexically_normal().filename().string(); }

 private:
  void remove_remnants() const;

  std::filesystem::path path_;
  int lock_ = -1;
};

}  // namespace latte::train
