#include "runtime/prompt_cache.h"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <filesystem>

#include "runtime/error.h"

namespace latte::runtime {

PromptCache::PromptCache(std::shared_ptr<const Model> model, const PromptCacheOptions& options)
    : model_(std::move(model)), options_(options) {}

PromptCache::~PromptCache() {
  for (const Entry& entry : entries_) {
    std::error_code ignored;
    if (!entry.file.empty()) std::filesystem::remove(entry.file, ignored);
  }
}

// The node that stands for `tokens`, made where there is none: an edge that leaves them in its middle is split there.
PromptCache::Node* PromptCache::insert(std::span<const int32_t> tokens) {
  Node* node = &root_;
  while (!tokens.empty()) {
    std::unique_ptr<Node>& child = node->children[tokens.front()];
    if (!child) {
      child = std::make_unique<Node>();
      child->run.assign(tokens.begin(), tokens.end());
      child->parent = node;
      return child.get();
    }
    const auto common = static_cast<size_t>(
        std::mismatch(child->run.begin(), child->run.end(), tokens.begin(), tokens.end()).first - child->run.begin());
    if (common < child->run.size()) {
      auto middle = std::make_unique<Node>();
      middle->run.assign(child->run.begin(), child->run.begin() + static_cast<std::ptrdiff_t>(common));
      middle->parent = node;
      child->run.erase(child->run.begin(), child->run.begin() + static_cast<std::ptrdiff_t>(common));
      child->parent = middle.get();
      const int32_t first = child->run.front();
      middle->children.emplace(first, std::move(child));
      child = std::move(middle);
    }
    node = child.get();
    tokens = tokens.subspan(common);
  }
  return node;
}

void PromptCache::put(std::span<const int32_t> tokens, const Session& session) {
  if (!session.holds(*model_)) throw SessionError("a session of another model");
  if (session.position() != static_cast<int64_t>(tokens.size())) {
    throw SessionError("the state has read " + std::to_string(session.position()) + " tokens, not these " +
                       std::to_string(tokens.size()));
  }
  if (tokens.empty() || session.bytes_in_use() > options_.memory_bytes) return;
  Node* node = insert(tokens);
  if (node->has_entry) {  // the same tokens give the same state
    entries_.splice(entries_.end(), entries_, node->entry);
    return;
  }
  try {
    Entry& entry = entries_.emplace_back();
    entry.node = node;
    node->entry = std::prev(entries_.end());
    node->has_entry = true;
    entry.session.emplace(session);
    entry.bytes = session.bytes_in_use();
    memory_used_ += entry.bytes;
  } catch (const MemoryError&) {
    drop(node->entry);
    return;
  }
  make_room();
}

std::optional<Session> PromptCache::longest(std::span<const int32_t> tokens) {
  if (tokens.empty()) return std::nullopt;
  std::span<const int32_t> rest = tokens.first(tokens.size() - 1);
  std::vector<Node*> candidates;
  for (Node* node = &root_;;) {
    if (node->has_entry) candidates.push_back(node);
    if (rest.empty()) break;
    const auto child = node->children.find(rest.front());
    if (child == node->children.end()) break;
    node = child->second.get();
    if (node->run.size() > rest.size() || !std::equal(node->run.begin(), node->run.end(), rest.begin())) break;
    rest = rest.subspan(node->run.size());
  }
  for (auto node = candidates.rbegin(); node != candidates.rend(); ++node) {
    const Entries::iterator entry = (*node)->entry;
    entries_.splice(entries_.end(), entries_, entry);
    if (entry->session) return *entry->session;
    try {
      return Session::load(entry->file, model_);
    } catch (const std::exception&) {  // a file that was lost or damaged meanwhile: the next shorter one will do
      drop(entry);
    }
  }
  return std::nullopt;
}

void PromptCache::make_room() {
  for (auto entry = entries_.begin(); entry != entries_.end() && memory_used_ > options_.memory_bytes;) {
    const auto next = std::next(entry);
    if (entry->session) {
      if (options_.folder.empty()) {
        drop(entry);
      } else {
        try {
          move_to_disk(*entry);
        } catch (const std::exception&) {  // a full disk: the state can be made again
          drop(entry);
        }
      }
    }
    entry = next;
  }
  for (auto entry = entries_.begin(); entry != entries_.end() && disk_used_ > options_.disk_bytes;) {
    const auto next = std::next(entry);
    if (!entry->session) drop(entry);
    entry = next;
  }
}

void PromptCache::move_to_disk(Entry& entry) {
  const std::string name = "latte-state-" + std::to_string(::getpid()) + "-" + std::to_string(files_made_++);
  const std::string file = (std::filesystem::path(options_.folder) / name).string();
  entry.session->save(file);
  entry.file = file;
  entry.session.reset();
  memory_used_ -= entry.bytes;
  disk_used_ += entry.bytes;
}

void PromptCache::drop(Entries::iterator entry) {
  if (entry->session) {
    memory_used_ -= entry->bytes;
  } else if (!entry->file.empty()) {
    disk_used_ -= entry->bytes;
    std::error_code ignored;
    std::filesystem::remove(entry->file, ignored);
  }
  Node* node = entry->node;
  node->has_entry = false;
  entries_.erase(entry);
  prune(node);
}

// Removes nodes that lead nowhere.
void PromptCache::prune(Node* node) {
  while (node->parent != nullptr && !node->has_entry && node->children.empty()) {
    Node* parent = node->parent;
    parent->children.erase(node->run.front());
    node = parent;
  }
}

}  // namespace latte::runtime
