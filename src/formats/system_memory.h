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

// Bytes of the line that begins with `name` in one of the system's files that count in kB; none where it isn't.
std::optional<uint64_t> kilobyte_field(const std::string& path, std::string_view name);

}  // namespace latte::formats
