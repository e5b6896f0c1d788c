#include "formats/adapter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "formats/error.h"
#include "formats/hash.h"

namespace latte::formats {
namespace {

constexpr std::string_view kVersionKey = "latte.version";
constexpr std::string_view kLatentsKey = "latte.latents";
constexpr int64_t kLargestSize = int64_t{1} << 24;  // of windows, sinks and limits
constexpr int64_t kMostLatents = int64_t{1} << 16;
constexpr int64_t kMostBlocks = int64_t{1} << 16;
constexpr std::string_view kAddedMark = ".latte_";

std::string block_prefix(int64_t block) { return "blk." + std::to_string(block) + ".latte_"; }

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::vector<int64_t> without_leading_ones(std::vector<int64_t> shape) {
  const auto first = std::find_if(shape.begin(), shape.end(), [](int64_t size) { return size != 1; });
  shape.erase(shape.begin(), first);
  return shape;
}

// Everything wrong, in one line; nothing where all is well.
class Problems {
 public:
  void add(const std::string& problem) {
    ++count_;
    if (count_ <= kMostShown) text_ += (count_ > 1 ? "; " : "") + problem;
  }
  void refuse_for(const std::string& path) const {
    if (count_ == 0) return;
    throw FormatError(path, count_ > kMostShown ? text_ + "; and " + std::to_string(count_ - kMostShown) + " more" : text_);
  }

 private:
  static constexpr size_t kMostShown = 1000;
  size_t count_ = 0;
  std::string text_;
};

bool is_finite(const GgufTensor& tensor) {
  const std::vector<float> numbers = tensor.floats();
  return std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isfinite(number); });
}

template <typename Tensor>
std::map<std::string, const Tensor*, std::less<>> by_name(std::span<const Tensor> tensors) {
  std::map<std::string, const Tensor*, std::less<>> named;
  for (const Tensor& tensor : tensors) named.emplace(tensor.name, &tensor);
  return named;
}

// Added tensors against what the spec asks for, changed ones against the base's.
void check_tensors(const AdapterSpec& spec, const BaseShape& shape, const GgufFile* base, std::span<const GgufTensor> tensors,
                   Problems& problems) {
  if (static_cast<int64_t>(spec.latents.size()) != shape.blocks) {
    problems.add("it is for " + std::to_string(spec.latents.size()) + " blocks, the base has " + std::to_string(shape.blocks));
    return;
  }
  const auto found = by_name(tensors);
  std::set<std::string, std::less<>> expected;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const LatentForm form = {.decay = found.contains(block_prefix(block) + "decay"),
                             .floor = found.contains(block_prefix(block) + "floor"),
                             .conv = found.contains(block_prefix(block) + "conv.weight")};
    if (form.floor && !spec.evicted) problems.add(block_prefix(block) + "floor goes with latte.evicted");
    if (form.conv && !spec.evicted) problems.add(block_prefix(block) + "conv.weight goes with latte.evicted");
    for (const GgufTensorSpec& wanted : adapter_tensors(spec, shape, block, form)) {
      expected.insert(wanted.name);
      const auto tensor = found.find(wanted.name);
      if (tensor == found.end()) {
        problems.add("missing tensor " + wanted.name);
      } else if (!same_shape(tensor->second->shape, wanted.shape)) {
        problems.add(wanted.name + " is " + shape_text(tensor->second->shape) + ", expected " + shape_text(wanted.shape));
      } else if (!can_dequantize(tensor->second->type)) {
        problems.add(wanted.name + " has a type that can't be read");
      } else if ((wanted.name.ends_with("latte_floor") || wanted.name.ends_with("latte_conv.weight")) &&
                 !is_finite(*tensor->second)) {
        problems.add(wanted.name + " holds a number that isn't finite");
      }
    }
  }
  for (const GgufTensor& tensor : tensors) {
    if (expected.contains(tensor.name)) continue;
    const GgufTensor* changed = base == nullptr || is_added_tensor(tensor.name) ? nullptr : base->find(tensor.name);
    if (changed == nullptr) {
      if (base != nullptr || is_added_tensor(tensor.name)) problems.add("unknown tensor " + quote(tensor.name));
    } else if (!same_shape(tensor.shape, changed->shape)) {
      problems.add(quote(tensor.name) + " is " + shape_text(tensor.shape) + ", the base's is " + shape_text(changed->shape));
    } else if (!can_dequantize(tensor.type)) {
      problems.add(quote(tensor.name) + " has a type that can't be read");
    }
  }
}

}  // namespace

int64_t AdapterSpec::converted_blocks() const {
  return std::count_if(latents.begin(), latents.end(), [](int32_t count) { return count >= 0; });
}

AdapterSpec AdapterSpec::from(const GgufMetadata& metadata) {
  const int64_t version = metadata.integer(kVersionKey, 0, std::numeric_limits<uint32_t>::max());
  if (version < 1 || version > kAdapterVersion) {
    metadata.refuse(kVersionKey, "1 … " + std::to_string(kAdapterVersion) + ", the versions that this latte reads");
  }
  AdapterSpec spec;
  spec.evicted = version > 1 && metadata.boolean("latte.evicted");
  spec.window = metadata.integer("latte.window", 1, kLargestSize);
  spec.sinks = metadata.integer("latte.sinks", 0, kLargestSize);
  spec.far_limit = metadata.integer("latte.far_limit", 1, kLargestSize);
  const std::vector<int64_t> latents = metadata.integers(kLatentsKey);
  if (latents.empty() || static_cast<int64_t>(latents.size()) > kMostBlocks) metadata.refuse(kLatentsKey, "one number a block");
  for (int64_t count : latents) {
    if (count < -1 || count > kMostLatents) metadata.refuse(kLatentsKey, "numbers of -1 … " + std::to_string(kMostLatents));
    spec.latents.push_back(static_cast<int32_t>(count));
  }
  spec.base_hash = metadata.string("latte.base.hash");
  spec.base_name = metadata.string_or("latte.base.name", "");
  spec.recipe = metadata.string_or("latte.recipe", "");
  return spec;
}

void AdapterSpec::put_into(GgufMetadata& metadata) const {
  metadata.set(std::string(kVersionKey),
               evicted ? uint32_t{2} : uint32_t{1});  // whoever reads 1 alone can read what needs no more
  if (evicted) metadata.set("latte.evicted", true);
  metadata.set("latte.window", static_cast<uint32_t>(window));
  metadata.set("latte.sinks", static_cast<uint32_t>(sinks));
  metadata.set("latte.far_limit", static_cast<uint32_t>(far_limit));
  metadata.set(std::string(kLatentsKey), GgufArray(latents));
  metadata.set("latte.base.hash", base_hash);
  metadata.set("latte.base.name", base_name);
  metadata.set("latte.recipe", recipe);
}

BaseShape BaseShape::from(const GgufMetadata& metadata) {
  BaseShape shape;
  shape.architecture = metadata.string("general.architecture");
  const auto size = [&](const char* key, int64_t most) { return metadata.integer(shape.architecture + "." + key, 1, most); };
  shape.blocks = size("block_count", kMostBlocks);
  shape.embed_dim = size("embedding_length", kLargestSize);
  shape.num_heads = size("attention.head_count", kMostBlocks);
  shape.num_kv_heads = metadata.integer_or(shape.architecture + ".attention.head_count_kv", shape.num_heads, 1, shape.num_heads);
  shape.head_dim = metadata.integer_or(shape.architecture + ".attention.key_length",
                                       std::max<int64_t>(1, shape.embed_dim / shape.num_heads), 1, kLargestSize);
  return shape;
}

std::vector<GgufTensorSpec> adapter_tensors(const AdapterSpec& spec, const BaseShape& base, int64_t block, LatentForm form) {
  const int64_t latents = spec.latents.at(static_cast<size_t>(block));
  if (latents <= 0) return {};
  const std::string prefix = block_prefix(block);
  const auto tensor = [&](const char* name, std::vector<int64_t> shape) {
    return GgufTensorSpec{prefix + name, TensorType::kF32, std::move(shape)};
  };
  std::vector<GgufTensorSpec> tensors = {
      tensor("query.weight", {base.num_heads, latents, base.head_dim}),
      tensor("query.bias", {base.num_heads, latents}),
      tensor("key.weight", {base.num_kv_heads, latents, base.head_dim}),
      tensor("key.bias", {base.num_kv_heads, latents}),
      tensor("gate.weight", {base.num_heads, base.embed_dim}),
      tensor("gate.bias", {base.num_heads}),
      tensor("gate.slope", {base.num_heads}),
  };
  if (form.decay) tensors.push_back(tensor("decay", {base.num_kv_heads, latents}));
  if (form.floor) tensors.push_back(tensor("floor", {base.num_kv_heads, latents}));
  if (form.conv) tensors.push_back(tensor("conv.weight", {base.num_kv_heads, base.head_dim, kKeyConvWidth}));
  return tensors;
}

bool is_adapter(const GgufMetadata& metadata) {
  const auto holds = [&](std::string_view key, std::string_view text) {
    const GgufValue* value = metadata.find(key);
    const auto* found = value == nullptr ? nullptr : std::get_if<std::string>(value);
    return found != nullptr && *found == text;
  };
  return holds("general.type", "adapter") && holds("adapter.type", "latte");
}

bool same_shape(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  return without_leading_ones(a) == without_leading_ones(b);
}

std::vector<int64_t> with_dims(std::vector<int64_t> shape, size_t dims) {
  shape = without_leading_ones(std::move(shape));
  if (shape.size() < dims) shape.insert(shape.begin(), dims - shape.size(), 1);
  return shape;
}

bool is_added_tensor(std::string_view name) { return name.find(kAddedMark) != std::string_view::npos; }

std::vector<GgufTensorSpec> base_tensors(const GgufFile& model) {
  const bool merged = model.metadata().has(kVersionKey);
  std::vector<GgufTensorSpec> tensors;
  for (const GgufTensor& tensor : model.tensors()) {
    if (!merged || !is_added_tensor(tensor.name)) tensors.push_back(tensor);
  }
  return tensors;
}

AdapterFile::AdapterFile(const std::string& path) : file_(path) {
  if (!is_adapter(file_.metadata())) throw FormatError(path, "not an adapter of latte (general.type and adapter.type)");
  spec_ = AdapterSpec::from(file_.metadata());
}

void AdapterFile::check_fits(const GgufFile& base) const {
  Problems problems;
  const std::string& architecture = file_.metadata().string("general.architecture");
  const BaseShape shape = BaseShape::from(base.metadata());
  if (architecture != shape.architecture) {
    problems.add("made for architecture " + quote(architecture) + ", " + base.path() + " is " + quote(shape.architecture));
  }
  Hash hash;
  hash.add(base.bytes());
  if (const std::string digits = hash.digits(); digits != spec_.base_hash) {
    problems.add("made for " + quote(spec_.base_name) + " with hash " + quote(spec_.base_hash) + ", " + base.path() + " has " +
                 digits);
  }
  check_tensors(spec_, shape, &base, file_.tensors(), problems);
  problems.refuse_for(file_.path());
}

std::optional<AdapterSpec> merged_spec(const GgufFile& model) {
  if (!model.metadata().has(kVersionKey) || is_adapter(model.metadata())) return std::nullopt;
  AdapterSpec spec = AdapterSpec::from(model.metadata());
  Problems problems;
  check_tensors(spec, BaseShape::from(model.metadata()), nullptr, model.tensors(), problems);
  problems.refuse_for(model.path());
  return spec;
}

void write_adapter(const std::string& path, const AdapterSpec& spec, const GgufFile& base, std::span<const GgufTensor> tensors,
                   FileOperations& operations) {
  Problems problems;
  check_tensors(spec, BaseShape::from(base.metadata()), &base, tensors, problems);
  problems.refuse_for(path);
  GgufMetadata metadata(path);
  metadata.set("general.type", std::string("adapter"));
  metadata.set("general.architecture", base.metadata().string("general.architecture"));
  metadata.set("adapter.type", std::string("latte"));
  spec.put_into(metadata);
  write_gguf(path, metadata, tensors, operations);
}

void write_merged(const std::string& path, const AdapterSpec& spec, const GgufFile& base, std::span<const GgufTensor> tensors,
                  FileOperations& operations) {
  Problems problems;
  check_tensors(spec, BaseShape::from(base.metadata()), &base, tensors, problems);
  problems.refuse_for(path);
  GgufMetadata metadata = base.metadata();
  spec.put_into(metadata);
  std::vector<GgufTensor> all = base.tensors();
  const auto ours = by_name(tensors);
  for (GgufTensor& tensor : all) {
    if (const auto changed = ours.find(tensor.name); changed != ours.end()) tensor = *changed->second;
  }
  for (const GgufTensor& tensor : tensors) {
    if (is_added_tensor(tensor.name)) all.push_back(tensor);
  }
  write_gguf(path, metadata, all, operations);
}

}  // namespace latte::formats
