#include "cli/latte_llama_peer.h"

#include <ggml-cpu.h>
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <vector>

namespace latte::cli {

struct LlamaPeer::Parts {
  llama_model* model = nullptr;
  llama_context* context = nullptr;
  ggml_threadpool* pool = nullptr;
  ~Parts() {
    if (context != nullptr) llama_free(context);
    if (model != nullptr) llama_model_free(model);
    if (pool != nullptr) ggml_threadpool_free(pool);
  }
};

LlamaPeer::LlamaPeer(const std::string& path, int threads) : parts_(std::make_unique<Parts>()), threads_(threads) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model_params weights = llama_model_default_params();
  // Its path for AMX ends the process on some virtual machines that have it; without, weights aren't repacked either.
  if (ggml_cpu_has_amx_int8() != 0) weights.use_extra_bufts = false;
  parts_->model = llama_model_load_from_file(path.c_str(), weights);
  if (parts_->model == nullptr) throw std::runtime_error(path + ": libllama can't load it");
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  parts_->pool = ggml_threadpool_new(&params);  // as llama-bench does: threads that stay between steps
  if (parts_->pool == nullptr) throw std::runtime_error("libllama gives no threads");
}

LlamaPeer::~LlamaPeer() = default;

void LlamaPeer::start(int64_t tokens, bool flash_attention) {
  stop();
  llama_context_params params = llama_context_default_params();
  flash_ = flash_attention;
  params.n_ctx = static_cast<uint32_t>(tokens);
  params.n_seq_max = 2;  // fill() has a second one
  params.kv_unified = true;
  params.n_batch = 2048;
  params.n_ubatch = 512;
  params.n_threads = threads_;
  params.n_threads_batch = threads_;
  params.flash_attn_type = flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  parts_->context = llama_init_from_model(parts_->model, params);
  if (parts_->context == nullptr) throw std::runtime_error("libllama gives no context of " + std::to_string(tokens) + " tokens");
  llama_attach_threadpool(parts_->context, parts_->pool, nullptr);
}

void LlamaPeer::stop() {
  if (parts_->context != nullptr) llama_free(parts_->context);
  parts_->context = nullptr;
  position_ = 0;
}

void LlamaPeer::read(std::span<const int32_t> tokens) {
  constexpr size_t kBatch = 2048;
  for (size_t i = 0; i < tokens.size(); i += kBatch) {
    std::vector<llama_token> some(tokens.begin() + static_cast<std::ptrdiff_t>(i),
                                  tokens.begin() + static_cast<std::ptrdiff_t>(std::min(tokens.size(), i + kBatch)));
    const llama_batch batch = llama_batch_get_one(some.data(), static_cast<int32_t>(some.size()));
    if (llama_decode(parts_->context, batch) != 0) throw std::runtime_error("libllama can't read on");
    llama_synchronize(parts_->context);
    position_ += static_cast<int64_t>(some.size());
  }
}

bool LlamaPeer::fill(std::span<const int32_t> text, double seconds) {
  constexpr size_t kCopied = 2048;
  const auto start = std::chrono::steady_clock::now();
  const auto late = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds; };
  llama_memory_t memory = llama_get_memory(parts_->context);
  const bool copies = text.size() > kCopied && llama_memory_can_shift(memory) && llama_model_n_swa(parts_->model) == 0;
  if (!copies) {
    for (size_t i = 0; i < text.size(); i += kCopied) {
      if (late()) return false;
      read(text.subspan(i, std::min(kCopied, text.size() - i)));
    }
    return true;
  }
  const auto put = [&](llama_seq_id sequence) {
    if (llama_state_seq_set_data(parts_->context, beginning_.data(), beginning_.size(), sequence) == 0) {
      throw std::runtime_error("libllama can't copy its state");
    }
  };
  if (beginning_.empty() || beginning_flash_ != flash_) {
    read(text.first(kCopied));
    beginning_.resize(llama_state_seq_get_size(parts_->context, 0));
    beginning_.resize(llama_state_seq_get_data(parts_->context, beginning_.data(), beginning_.size(), 0));
    beginning_flash_ = flash_;
  } else {
    put(0);
  }
  size_t filled = kCopied;
  for (; filled + kCopied <= text.size(); filled += kCopied) {
    put(1);
    llama_memory_seq_add(memory, 1, 0, -1, static_cast<llama_pos>(filled));
    llama_memory_seq_cp(memory, 1, 0, -1, -1);
    llama_memory_seq_rm(memory, 1, -1, -1);
  }
  position_ = static_cast<int64_t>(filled);
  if (filled < text.size()) read(text.subspan(filled));
  // Keys are rotated to their new places with the next token that is read.
  const int64_t depth = position_;
  read(text.first(1));
  go_back(depth);
  return true;
}

void LlamaPeer::go_back(int64_t position) {
  llama_memory_seq_rm(llama_get_memory(parts_->context), 0, static_cast<llama_pos>(position), -1);
  position_ = position;
}

}  // namespace latte::cli
