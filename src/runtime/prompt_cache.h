// Saved states by the tokens that led to them: the next turn of a conversation starts from the longest known beginning, whatever
// kind of state the model has. States are kept in memory up to a limit; those longest unused move to a folder, if there is one,
// up to a limit of its own, and are then forgotten.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/session.h"

namespace latte::runtime {

struct PromptCacheOptions {
  uint64_t memory_bytes = uint64_t{1} << 30;
  std::string folder;  // empty: memory alone
  uint64_t disk_bytes = uint64_t{8} << 30;
};

// For one thread at a time, and one model.
class PromptCache {
 public:
  explicit PromptCache(std::shared_ptr<const Model> model, const PromptCacheOptions& options = {});
  ~PromptCache();  // removes its files

  // Keeps a copy of the state that has read exactly `tokens`. What can't be kept (too large, a full disk) is let go.
  void put(std::span<const int32_t> tokens, const Session& session);

  // A copy of the state with the longest beginning of `tokens` that was put, at most tokens.size() - 1 of them, so that there is
  // a token left to read and to get logits from. Nothing where there is none.
  std::optional<Session> longest(std::span<const int32_t> tokens);

  size_t entries() const { return entries_.size(); }
  uint64_t memory_used() const { return memory_used_; }
  uint64_t disk_used() const { return disk_used_; }

 private:
  struct Node;
  struct Entry {
    std::optional<Session> session;  // else in the file
    std::string file;
    uint64_t bytes = 0;
    Node* node = nullptr;
  };
  using Entries = std::list<Entry>;
  // A prefix tree: an edge holds a run of tokens.
  struct Node {
    std::vector<int32_t> run;  // from the parent to here
    Node* parent = nullptr;
    std::unordered_map<int32_t, std::unique_ptr<Node>> children;  // by their run's first token
    Entries::iterator entry;
    bool has_entry = false;
  };

  Node* insert(std::span<const int32_t> tokens);
  void make_room();
  void move_to_disk(Entry& entry);
  void drop(Entries::iterator entry);
  void prune(Node* node);

  std::shared_ptr<const Model> model_;
  PromptCacheOptions options_;
  Node root_;
  Entries entries_;  // least recently used first
  uint64_t memory_used_ = 0;
  uint64_t disk_used_ = 0;
  uint64_t files_made_ = 0;
};

}  // namespace latte::runtime
