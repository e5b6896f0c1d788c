// Training checkpoints: one safetensors file with the weights, the optimizer's tensors, the random generators' states (as U8
// tensors) and whatever else training needs, and with this metadata:
//
//   format    "latte.checkpoint"
//   version   "1"
//   config    a JSON object, whose meaning is the trainer's
//   step      optimizer steps taken, in decimal
//   checksum  32 hexadecimal digits: XXH3 (128 bits) of everything else
//
// The checksum covers, each number as 64 bits little-endian and each text behind its length: the count of the other metadata
// entries, and key and value of each in the order of the keys; the count of tensors, and of each in the order of their names its
// name, dtype, rank, dimensions, byte count and bytes. So it doesn't depend on the order in which a writer lays tensors out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "formats/safetensors.h"

namespace latte::formats {

constexpr std::string_view kCheckpointFormat = "latte.checkpoint";
constexpr std::string_view kCheckpointVersion = "1";
constexpr std::string_view kCheckpointName = "checkpoint.safetensors";  // in a run's folder

// `path`, or the checkpoint in it if it is a folder.
std::string checkpoint_path(const std::string& path);

struct CheckpointHeader {
  std::string config;  // a JSON object
  int64_t step = 0;    // >= 0
};

// Writes `path` atomically: after a failure the previous checkpoint is as it was. Throws as write_safetensors does, and
// std::invalid_argument for a config that isn't a JSON object or a negative step.
void write_checkpoint(const std::string& path, const CheckpointHeader& header, std::span<const TensorView> tensors,
                      FileOperations& operations = FileOperations::system());

class CheckpointFile {
 public:
  // Reads and verifies the whole file. Throws FileError, or FormatError for a file that isn't a checkpoint, is of another
  // version, is cut short or damaged.
  explicit CheckpointFile(const std::string& path);

  const std::string& config() const { return header_.config; }
  int64_t step() const { return header_.step; }
  const SafetensorsFile& file() const { return file_; }  // the tensors

 private:
  SafetensorsFile file_;
  CheckpointHeader header_;
};

}  // namespace latte::formats
