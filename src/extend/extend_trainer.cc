#include "extend/extend_trainer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "extend/evaluate.h"
#include "extend/kl_loss.h"
#include "formats/error.h"
#include "formats/hash.h"
#include "train/training_checkpoint.h"

namespace latte::extend {
namespace {

at::ScalarType scalar_type(const std::string& dtype) { return dtype == "bfloat16" ? torch::kBFloat16 : torch::kFloat32; }

// Of a stretch of tokens [B, T + 1], what is read and what follows it.
at::Tensor inputs_of(const at::Tensor& tokens) { return tokens.slice(1, 0, -1); }
at::Tensor targets_of(const at::Tensor& tokens) { return tokens.slice(1, 1).flatten(); }

int64_t drawn_window(const ExtendOptions& options, int64_t step) {
  const auto windows = options.training_windows();
  std::seed_seq sequence{static_cast<uint32_t>(options.seed), static_cast<uint32_t>(step), 0x77u};
  std::mt19937 random(sequence);
  return windows[random() % windows.size()];
}

constexpr double kLoraScale = 2.0;  // alpha / rank

bool trains(const ExtendOptions& options, const std::string& name) {
  if (options.train == "latents" || !name.starts_with("blk.")) return false;
  if (options.train == "all") return true;
  for (const char* part : {".attn_q.weight", ".attn_k.weight", ".attn_v.weight", ".attn_output.weight"}) {
    if (name.ends_with(part)) return true;
  }
  return false;
}

// As in `from`, but for what is made anew.
std::vector<LatentForm> forms_of(const ExtendOptions& options, const formats::AdapterSpec& spec,
                                 const std::vector<LatentForm>& from) {
  const LatentForm anew = options.form_anew();
  std::vector<LatentForm> forms(spec.latents.size(), anew);
  for (size_t block = 0; block < forms.size(); ++block) {
    const auto index = static_cast<int64_t>(block);
    if (from.empty()) {
      if (!options.matches(index)) {  // a floor would stay absent
        forms[block].floor = false;
        forms[block].decay = options.forget;
      }
    } else if (!options.matches(index)) {
      forms[block] = from[block];
    } else if (!options.matched_heads(index).empty()) {  // beside others of the file's form
      forms[block] = {.decay = from[block].decay || anew.decay,
                      .floor = from[block].floor || anew.floor,
                      .conv = from[block].conv || anew.conv};
    }
  }
  return forms;
}

// Of an adapter to start from, which is checked first.
std::vector<LatentForm> forms_of_start(const ExtendOptions& options, const formats::AdapterSpec& spec) {
  if (options.from.empty()) return {};
  const formats::AdapterFile from(options.from);
  from.check_fits(formats::GgufFile(options.model));
  const auto& latents = from.spec().latents;
  const bool any = std::any_of(latents.begin(), latents.end(), [](int32_t count) { return count > 0; });
  if (any && options.attention == "macchiato" && from.spec().evicted != spec.evicted) {
    throw OptionError("from " + options.from + ": its latents read " +
                      (from.spec().evicted ? "what left the window, those asked for everything: leave --latents-read-all out"
                                           : "everything, those asked for what left the window: --latents-read-all goes on"));
  }
  return forms_in(from.file(), from.spec());
}

}  // namespace

formats::AdapterSpec spec_of(const ExtendOptions& options, const formats::DecoderConfig& config) {
  options.check_blocks(config.num_layers, config.num_kv_heads);
  formats::AdapterSpec spec;
  spec.window = options.window;
  spec.sinks = options.sinks;
  spec.far_limit = options.far_limit;
  spec.evicted = options.evicted && options.attention == "macchiato";
  for (int64_t block = 0; block < config.num_layers; ++block) {
    // Local layers have a window of their own already.
    const bool stays = options.attention == "full" || config.is_local(block);
    spec.latents.push_back(stays ? -1 : options.attention == "macchiato" ? static_cast<int32_t>(options.latents_of(block)) : 0);
  }
  spec.base_hash = formats::hash_of_file(options.model);
  return spec;
}

ExtendTrainer::ExtendTrainer(const ExtendOptions& options, const TokenText& text)
    : options_(options), dtype_(train::resolve_dtype(options.dtype)), text_(text) {
  options.validate();
  require_original(options.model);
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  original_ = models::load_decoder(options.model, models::DecoderOptions{.dtype = scalar_type(dtype_)});
  if (options.attention != "full" && !is_convertible(original_->config())) {
    throw OptionError("attention is " + options.attention + ", expected full: " + options.model +
                      " caps its attention's scores (" + original_->config().architecture + "), which a window doesn't");
  }
  formats::AdapterSpec spec = spec_of(options, original_->config());
  spec.base_name = formats::GgufFile(options.model).metadata().string_or("general.name", "");
  const auto from = forms_of_start(options, spec);
  student_ = make_converted(options.model, spec, forms_of(options, spec, from), scalar_type(dtype_));
  collect_parameters();
  if (!options.from.empty()) start_from(options.from, from);
  if (!options.teacher_cache.empty()) teacher_cache_.emplace(options.teacher_cache, spec.base_hash, dtype_);
  held_out_ = text.held_out(options.eval_sequences);
}

void ExtendTrainer::collect_parameters() {
  auto originals = original_->named_parameters();
  train::AdamW::NamedTensors pretrained;
  for (auto& item : student_.model->named_parameters()) {
    at::Tensor* original = originals.find(item.key());
    if (original == nullptr) continue;  // of latents
    if (trains(options_, item.key())) {
      item.value().requires_grad_(true);
      Master master{item.key(), original->detach().to(torch::kFloat32, /*non_blocking=*/false, /*copy=*/true), item.value()};
      if (options_.train == "lora") {
        const int64_t rank = std::min({options_.lora_rank, original->size(0), original->size(1)});
        master.down = torch::randn({rank, original->size(1)}) / std::sqrt(static_cast<double>(original->size(1)));
        master.up = torch::zeros({original->size(0), rank});
        pretrained.emplace_back(item.key() + ".lora_a", master.down.requires_grad_(true));
        pretrained.emplace_back(item.key() + ".lora_b", master.up.requires_grad_(true));
      } else {
        pretrained.emplace_back(item.key(), master.master.requires_grad_(true));
      }
      masters_.push_back(std::move(master));
    } else {
      item.value().set_data(original->data());  // one copy of what stays
    }
  }
  train::AdamW::NamedTensors matrices, gates, gate_biases, vectors;
  for (auto& [name, parameter] : latent_tensors(student_.converted)) {
    const bool matrix = name.ends_with("query.weight") || name.ends_with("key.weight") || name.ends_with("conv.weight");
    const bool apart = options_.gate_lr > 0 && name.ends_with("gate.bias");
    (matrix ? matrices : name.ends_with("gate.weight") ? gates : apart ? gate_biases : vectors).emplace_back(name, parameter);
  }
  const auto add = [&](const char* name, double lr, const train::AdamW::NamedTensors& tensors) {
    if (tensors.empty()) return;
    groups_.push_back({name, lr, train::AdamW(tensors, {.beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.0})});
    for (const auto& [key, tensor] : tensors) parameters_.push_back(tensor);
  };
  add("attention", options_.lr, pretrained);
  add("matrices", options_.latent_lr, matrices);
  add("gates", options_.latent_lr / 3, gates);
  add("gate_biases", options_.gate_lr, gate_biases);
  add("vectors", options_.vector_lr, vectors);
}

void ExtendTrainer::start_from(const std::string& path, const std::vector<LatentForm>& forms) {
  const formats::AdapterFile adapter(path);
  const torch::NoGradGuard no_grad;
  auto parameters = student_.model->named_parameters();
  for (const formats::GgufTensor& tensor : adapter.file().tensors()) {
    // What doesn't train shares its memory with the original.
    at::Tensor* parameter = parameters.find(tensor.name);
    if (parameter == nullptr) continue;
    parameter->set_data(parameter->detach().clone());
    if (!parameter->requires_grad()) kept_.emplace_back(tensor.name, *parameter);
  }
  fill_from(student_, adapter, [this](int64_t block, int64_t theirs, int64_t ours) {
    const bool latents = theirs > 0 && ours > 0;  // in both
    return latents && options_.matches(block) && (options_.matched_heads(block).empty() || ours > theirs);
  });
  for (size_t block = 0; block < forms.size(); ++block) {  // what forgets nothing there doesn't begin to, beside others that do
    const auto& attention = student_.converted[block];
    if (attention && attention->latents() && attention->latents()->decay.defined() && !forms[block].decay) {
      attention->latents()->decay.fill_(formats::kAbsent);
    }
  }
  for (Master& master : masters_) master.master.copy_(master.weight);
}

at::Tensor ExtendTrainer::Master::value() const {
  const torch::NoGradGuard no_grad;
  return down.defined() ? at::addmm(master, up, down, /*beta=*/1.0, kLoraScale) : master;
}

void ExtendTrainer::Master::take_gradient() {
  if (!weight.grad().defined()) return;
  const torch::NoGradGuard no_grad;
  const auto gradient = weight.grad().to(torch::kFloat32);
  weight.mutable_grad() = at::Tensor();
  if (down.defined()) {
    down.mutable_grad() = at::matmul(up.t(), gradient) * kLoraScale;
    up.mutable_grad() = at::matmul(gradient, down.t()) * kLoraScale;
  } else {
    master.mutable_grad() = gradient;
  }
}

void ExtendTrainer::masters_to_model() {
  const torch::NoGradGuard no_grad;
  for (Master& master : masters_) master.weight.copy_(master.value());
}

at::Tensor ExtendTrainer::teacher_hidden(const at::Tensor& tokens) {
  const torch::NoGradGuard no_grad;
  const auto compute = [&] {
    auto forward = models::DecoderForwardOptions();
    forward.logits = models::DecoderForwardOptions::kNoLogits;
    return original_->forward(inputs_of(tokens), forward).hidden.flatten(0, 1);
  };
  return teacher_cache_ ? teacher_cache_->get(inputs_of(tokens), compute) : compute();
}

void ExtendTrainer::match(const MatchWatch& watch, int64_t first) {
  const bool any = std::any_of(student_.converted.begin(), student_.converted.end(),
                               [](const auto& attention) { return attention && attention->latents(); });
  const bool anew = !options_.from.empty();
  if (!any || options_.match_sequences == 0 || (anew && options_.match_layers.empty())) return;
  std::vector<at::Tensor> sequences;
  for (int64_t i = 0; i < options_.match_sequences; ++i) {
    // Numbers from the far end: other stretches than the steps'.
    const auto index = std::numeric_limits<uint64_t>::max() - static_cast<uint64_t>(i);
    sequences.push_back(inputs_of(text_.sample(1, options_.context, static_cast<uint64_t>(options_.seed), index))[0]);
  }
  if (anew) {
    rematch_latents(student_.model, original_, student_.converted, sequences, options_, watch, first);
  } else {
    match_latents(original_, student_.converted, sequences, options_, watch, first);
  }
}

StepResult ExtendTrainer::step() {
  StepResult result;
  result.window = drawn_window(options_, steps_done_);
  const int64_t length = options_.context_of(steps_done_), batch = options_.batch * (options_.context / length);
  const auto tokens = text_.sample(batch, length, static_cast<uint64_t>(options_.seed), static_cast<uint64_t>(steps_done_));
  for (const auto& attention : student_.converted) {
    if (attention) attention->set_window(result.window);
  }
  auto forward = models::DecoderForwardOptions();
  forward.logits = models::DecoderForwardOptions::kNoLogits;
  const auto hidden = student_.model->forward(inputs_of(tokens), forward).hidden.flatten(0, 1);
  at::Tensor loss;
  if (options_.loss == "text") {
    loss = next_token_loss(hidden, targets_of(tokens), head_of(original_));
  } else if (options_.text_share > 0) {
    loss = mixed_loss(hidden, teacher_hidden(tokens), targets_of(tokens), options_.text_share, head_of(original_));
  } else {
    loss = kl_to_teacher(hidden, teacher_hidden(tokens), head_of(original_));
  }
  loss.backward();
  for (const auto& attention : student_.converted) {
    if (attention) attention->set_window(options_.window);
  }
  for (Master& master : masters_) master.take_gradient();
  result.loss = loss.item<double>();
  const double limit = options_.clip > 0 ? options_.clip : std::numeric_limits<double>::infinity();
  result.grad_norm = torch::nn::utils::clip_grad_norm_(parameters_, limit);
  const double factor = learning_rate_factor(options_, steps_done_);
  result.lr = (groups_.empty() ? 0.0 : groups_.front().lr) * factor;
  if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) {
    ++steps_done_;
    for (Group& group : groups_) group.optimizer.step(group.lr * factor, steps_done_);
    masters_to_model();
  }
  for (Group& group : groups_) group.optimizer.zero_grad();
  return result;
}

Validation ExtendTrainer::validate(bool latents_off) {
  const torch::NoGradGuard no_grad;
  if (!held_out_hidden_.defined()) {
    std::vector<at::Tensor> rows;
    for (int64_t i = 0; i < held_out_.size(0); ++i) rows.push_back(teacher_hidden(held_out_.slice(0, i, i + 1)));
    held_out_hidden_ = at::stack(rows);
  }
  for (const auto& attention : student_.converted) {
    if (attention) attention->set_latents_off(latents_off);
  }
  Validation total;
  auto forward = models::DecoderForwardOptions();
  forward.logits = models::DecoderForwardOptions::kNoLogits;
  for (int64_t i = 0; i < held_out_.size(0); ++i) {
    const auto tokens = held_out_.slice(0, i, i + 1);
    const auto hidden = student_.model->forward(inputs_of(tokens), forward).hidden.flatten(0, 1);
    const TokenLosses losses = token_losses(hidden, targets_of(tokens), head_of(original_), held_out_hidden_[i]);
    total.kl += losses.kl.mean().item<double>() / static_cast<double>(held_out_.size(0));
    total.next_token += losses.next_token.mean().item<double>() / static_cast<double>(held_out_.size(0));
  }
  for (const auto& attention : student_.converted) {
    if (attention) attention->set_latents_off(false);
  }
  return total;
}

train::AdamW::NamedTensors ExtendTrainer::state() const {
  train::AdamW::NamedTensors tensors;
  for (const Master& master : masters_) {
    const std::string name = "attention." + master.name;
    if (master.down.defined()) {
      tensors.emplace_back(name + ".lora_a", master.down.detach());
      tensors.emplace_back(name + ".lora_b", master.up.detach());
    } else {
      tensors.emplace_back(name, master.master.detach());
    }
  }
  for (const auto& [name, tensor] : latent_tensors(student_.converted)) tensors.emplace_back("latents." + name, tensor.detach());
  for (const Group& group : groups_) {
    for (const auto& [name, tensor] : group.optimizer.state()) {
      tensors.emplace_back("optimizer." + group.name + "." + name, tensor);
    }
  }
  return tensors;
}

void ExtendTrainer::save(const std::string& path, const std::string& config) const {
  const auto tensors = state();
  std::vector<formats::TensorView> views;
  for (const auto& [name, tensor] : tensors) views.push_back(train::view_of(name, tensor));
  formats::write_checkpoint(path, {config, steps_done_}, views);
}

void ExtendTrainer::load(const formats::CheckpointFile& checkpoint) {
  const auto tensors = state();
  std::vector<formats::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back(train::view_of(name, tensor));
  checkpoint.file().require(specs);
  for (const auto& [name, tensor] : tensors) train::copy_from(checkpoint.file(), name, tensor);
  steps_done_ = checkpoint.step();
  masters_to_model();
}

StoredTensors ExtendTrainer::adapter_tensors() const {
  const Storage storage = storage_named(options_.storage);
  StoredTensors stored;
  for (const auto& [name, tensor] : latent_tensors(student_.converted)) stored.add(name, tensor, storage);
  for (const Master& master : masters_) stored.add(master.name, master.value(), storage);
  for (const auto& [name, tensor] : kept_) stored.add(name, tensor, storage);
  return stored;
}

int64_t ExtendTrainer::trained_parameters() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters_) count += parameter.numel();
  return count;
}

}  // namespace latte::extend
