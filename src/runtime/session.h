// A decoding state: all that a model remembers of the tokens it has read. A value: it is copied, saved and loaded, and what is
// done to one session never shows in another.
//
// Per layer and key-value head it holds a ring of the last W keys and values (every token's where a layer reads all), the first S
// of them (sinks), and the sums of latents or of linear attention; per layer also what a convolution (of inputs, or of latents'
// keys) or RG-LRU remembers. Its memory is known beforehand and taken when it is made; of a layer that reads every token the
// system hands out only what is used.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/cached_attention.h"
#include "kernels/types.h"
#include "runtime/memory.h"
#include "runtime/model.h"

namespace latte::runtime {

struct SessionOptions {
  int64_t context = 0;  // tokens that layers which read everything have room for; 0: as many as the model was trained on
  kernels::DType dtype = kernels::DType::kFloat16;  // of keys and values
};

class Session {
 public:
  // Throws MemoryError.
  explicit Session(std::shared_ptr<const Model> model, const SessionOptions& options = {});
  Session(const Session& other);
  Session& operator=(const Session& other);
  Session(Session&&) noexcept = default;
  Session& operator=(Session&&) noexcept = default;

  const Model& model() const { return *model_; }
  const std::shared_ptr<const Model>& shared_model() const { return model_; }
  int64_t position() const { return position_; }  // tokens read
  int64_t room() const;                           // tokens that may still come; the largest number where nothing fills up
  bool holds(const Model& model) const { return model_.get() == &model; }

  // Bytes that a session takes, and this one's; of those that are only used with every token, those in use.
  static uint64_t bytes_needed(const Model& model, const SessionOptions& options = {});
  uint64_t bytes() const { return memory_.size(); }
  uint64_t bytes_in_use() const;

  // Goes back to an earlier position. Only where nothing was lost since: layers with latents, and windows that have moved on,
  // can't (except to 0).
  bool can_truncate(int64_t position) const;
  void truncate(int64_t position);  // throws SessionError

  // Atomic, versioned, checksummed; bound to the model's files and attention. `note` is the caller's, for what belongs to the
  // state and isn't in it, such as a conversation's text. Throws FileError.
  void save(const std::string& path, std::string_view note = {}) const;
  // Throws FileError; StateError for a file that is damaged, or of another version or model.
  static Session load(const std::string& path, std::shared_ptr<const Model> model, std::string* note = nullptr);

  // For the engine: the parts of one layer and key-value head.
  kernels::KeyValueCache ring(int64_t layer, int64_t kv_head) const;
  kernels::KeyValueCache sinks(int64_t layer, int64_t kv_head) const;  // slots 0: there are none
  // Latents [Hkv, L, D + 3], with a floor D + 4; linear attention [Hkv, D, D + 1], its normaliser behind each row.
  float* sums(int64_t layer) const;
  // Conv [K - 1, E], RG-LRU [E]; of latents' keys the last that left the window, not rotated, [Hkv, kKeyConvWidth - 1, Dk].
  float* mixer(int64_t layer) const;
  int64_t window(int64_t layer) const { return places_[static_cast<size_t>(layer)].window; }  // W, of a ring
  void advance(int64_t tokens) { position_ += tokens; }

 private:
  struct Place {
    int64_t window = 0;                // tokens of the ring
    size_t ring = 0, ring_bytes = 0;   // of one key-value head
    size_t sinks = 0, sink_bytes = 0;  // likewise; 0 where there are none
    size_t sums = 0, sum_bytes = 0;
    size_t mixer = 0, mixer_bytes = 0;
  };
  static std::vector<Place> lay_out(const ModelShape& shape, const SessionOptions& options, size_t& total);
  void clear_sums();
  // The stretches of memory that hold something, in a fixed order.
  struct Stretch {
    size_t begin, size;
  };
  std::vector<Stretch> stretches(int64_t position) const;

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  std::vector<Place> places_;
  Buffer memory_;
  int64_t position_ = 0;
};

}  // namespace latte::runtime
