// Pretrained models with converted attention: put together from a base and an adapter, or a merged file, and taken apart again.
#pragma once

#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "extend/converted_attention.h"
#include "formats/adapter.h"
#include "models/decoder.h"

namespace latte::extend {

struct ConvertedModel {
  models::Decoder model{nullptr};
  std::vector<ConvertedAttention> converted;  // one a block; empty where the attention is the base's
  formats::AdapterSpec spec;
};

// The base with an adapter applied, or without one a merged model. Throws formats::FileError, and formats::FormatError where one
// doesn't fit the other.
ConvertedModel load_converted(const std::string& model, const std::string& adapter, at::ScalarType dtype);

// Throws OptionError where the file is a whole converted model, formats::FileError and formats::FormatError.
void require_original(const std::string& model);

// A freshly converted base: latents closed, so that it equals window and sinks. Throws as load_decoder.
ConvertedModel make_converted(const std::string& model, const formats::AdapterSpec& spec, const std::vector<LatentForm>& forms,
                              at::ScalarType dtype);

// Which optional tensors each block of a spec has in a file: of an adapter, or of a merged model.
std::vector<LatentForm> forms_in(const formats::GgufFile& file, const formats::AdapterSpec& spec);

// Copies an adapter's tensors into a model of the same base and latents. Throws formats::FormatError where a block has another
// number of latents and may not, or where the file changes a tensor that the model hasn't. Latents that the model has more are
// never chosen.
void fill_from(ConvertedModel& converted, const formats::AdapterFile& adapter,
               const std::function<bool(int64_t block, int64_t theirs, int64_t ours)>& may_differ);

// Every parameter of the latents under its name in an adapter, "blk.N.latte_query.weight".
std::vector<std::pair<std::string, at::Tensor>> latent_tensors(const std::vector<ConvertedAttention>& converted);

// How an adapter's matrices are stored; vectors are float32 always.
enum class Storage : uint8_t { kQ8_0, kBFloat16, kFloat32 };
Storage storage_named(const std::string& name);  // "q8_0", "bf16", "f32"; OptionError for others

// A tensor to be written, with the bytes it borrows.
class StoredTensors {
 public:
  // Matrices whose columns don't fill Q8_0's blocks become bfloat16.
  void add(const std::string& name, const at::Tensor& tensor, Storage storage);
  const std::vector<formats::GgufTensor>& tensors() const { return tensors_; }
  size_t bytes() const;

 private:
  std::vector<std::vector<std::byte>> data_;
  std::vector<formats::GgufTensor> tensors_;
};

}  // namespace latte::extend
