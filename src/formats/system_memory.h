// What memory the operating system has left.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace latte::formats {

// Bytes that can still be had without swapping, and within the limits of the process's groups (a container's); none where the
// system doesn't say.
std::optional<uint64_t> free_memory();

// What Linux' control groups, version 1 or 2, leave to the members of those that the file `membership` lists, with their folders
// below `root`; the largest number where none has a limit.
uint64_t memory_left_to_groups(const std::string& membership = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup");

// Bytes of swap that can still be had, within the groups' limits; 0 where the system doesn't say.
uint64_t free_swap();

// As memory_left_to_groups, of swap.
uint64_t swap_left_to_groups(const std::string& membership = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup");

// Bytes that a process may take beyond those it has; none: as many as it can. `asked` is what the environment's
// LATTE_MEMORY_LIMIT says: megabytes, "none" for no limit, or nothing for its share of what is `free`, which it has in common
// with the other `processes` of a job on this machine (torchrun's LOCAL_WORLD_SIZE; what is no number counts as one). Throws
// std::invalid_argument where `asked` is something else.
std::optional<uint64_t> memory_allowed(std::string_view asked, std::optional<uint64_t> free, std::string_view processes);

// The whole number that `text` is; none where it is none, or 0.
std::optional<uint64_t> count_in(std::string_view text);

// Bytes of the line that begins with `name` in one of the system's files that count in kB; none where it isn't.
std::optional<uint64_t> kilobyte_field(const std::string& path, std::string_view name);

}  // namespace latte::formats
