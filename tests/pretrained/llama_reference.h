// llama.cpp's logits for a list of tokens: what latte's reading of a model is held against.
#pragma once

#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace latte {

class LlamaReference {
 public:
  // What a test changes in the way llama.cpp runs the model.
  using Change = std::function<void(llama_context_params&)>;

  LlamaReference(const std::string& path, int threads, Change change = {}) : threads_(threads), change_(std::move(change)) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.use_extra_bufts = false;  // no repacking: the plain kernels
    model_.reset(llama_model_load_from_file(path.c_str(), params));
    if (!model_) throw std::runtime_error("llama.cpp can't load " + path);
  }

  int64_t vocab_size() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }

  // Calls visit(i, logits after token i) for each token. The cache of keys and values is float32.
  void logits(std::span<const int64_t> tokens, const std::function<void(int64_t, std::span<const float>)>& visit) const {
    constexpr int32_t kBatch = 128;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(tokens.size()) + kBatch;
    params.n_batch = params.n_ubatch = kBatch;
    params.n_threads = params.n_threads_batch = threads_;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (change_) change_(params);
    const std::unique_ptr<llama_context, FreeContext> context(llama_init_from_model(model_.get(), params));
    if (!context) throw std::runtime_error("llama.cpp can't make a context");
    llama_batch batch = llama_batch_init(kBatch, 0, 1);
    const std::unique_ptr<llama_batch, FreeBatch> free_batch(&batch);
    const auto count = static_cast<int64_t>(tokens.size());
    for (int64_t begin = 0; begin < count; begin += kBatch) {
      batch.n_tokens = static_cast<int32_t>(std::min<int64_t>(kBatch, count - begin));
      for (int32_t i = 0; i < batch.n_tokens; ++i) {
        batch.token[i] = static_cast<llama_token>(tokens[static_cast<size_t>(begin + i)]);
        batch.pos[i] = static_cast<llama_pos>(begin + i);
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
      }
      if (llama_decode(context.get(), batch) != 0) throw std::runtime_error("llama_decode failed");
      for (int32_t i = 0; i < batch.n_tokens; ++i) {
        visit(begin + i, {llama_get_logits_ith(context.get(), i), static_cast<size_t>(vocab_size())});
      }
    }
  }

 private:
  struct FreeModel {
    void operator()(llama_model* model) const { llama_model_free(model); }
  };
  struct FreeContext {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  struct FreeBatch {
    void operator()(llama_batch* batch) const { llama_batch_free(*batch); }
  };
  std::unique_ptr<llama_model, FreeModel> model_;
  int threads_;
  Change change_;
};

}  // namespace latte
