#include "formats/system_memory.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "formats/atomic_file.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

class SystemMemoryTest : public ::testing::Test {
 protected:
  std::string membership(const std::string& text) { return put("groups", text); }
  std::string put(const std::string& name, const std::string& text) {
    std::string path = folder_ / name;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    write_file(path, text);
    return path;
  }
  uint64_t left(const std::string& groups) { return memory_left_to_groups(membership(groups), folder_ / ""); }

  TestFolder folder_;
};

TEST_F(SystemMemoryTest, TheTightestGroupCounts) {
  constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(left("0::/outer/inner\n"), kAll);  // no such folders
  put("outer/inner/memory.max", "max\n");
  put("outer/inner/memory.current", "10\n");
  EXPECT_EQ(left("0::/outer/inner\n"), kAll);
  put("outer/memory.max", "1000\n");
  put("outer/memory.current", "700\n");
  EXPECT_EQ(left("0::/outer/inner\n"), 300u);
  // Pages of files can be had again; those of shared memory, which "file" counts too, can't.
  put("outer/memory.stat", "anon 500\nfile 200\ninactive_file 60\nactive_file 40\n");
  EXPECT_EQ(left("0::/outer/inner\n"), 400u);
  put("outer/inner/memory.max", "50\n");
  EXPECT_EQ(left("0::/outer/inner\n"), 40u);
  put("outer/inner/memory.current", "90\n");
  EXPECT_EQ(left("0::/outer/inner\n"), 0u);
  EXPECT_EQ(left("0::/outer\n"), 400u);
  EXPECT_EQ(left("0::/\n"), kAll);
  EXPECT_EQ(left("no groups\n\n:\n"), kAll);
}

TEST_F(SystemMemoryTest, GroupsOfVersionOneCount) {
  put("memory/box/memory.limit_in_bytes", "4000\n");
  put("memory/box/memory.usage_in_bytes", "3000\n");
  put("memory/box/memory.stat", "inactive_file 7\ntotal_inactive_file 200\ntotal_active_file 100\n");
  EXPECT_EQ(left("5:cpu,memory:/box\n4:cpuset:/other\n"), 1300u);
  put("memory/memory.limit_in_bytes", "3500\n");
  put("memory/memory.usage_in_bytes", "3400\n");
  EXPECT_EQ(left("5:memory:/box\n"), 100u);
  EXPECT_EQ(left("5:cpu:/box\n"), std::numeric_limits<uint64_t>::max());
}

TEST_F(SystemMemoryTest, SwapHasItsOwnLimits) {
  constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();
  const auto swap = [&](const std::string& groups) { return swap_left_to_groups(membership(groups), folder_ / ""); };
  put("outer/inner/memory.max", "1000\n");
  put("outer/inner/memory.current", "700\n");
  EXPECT_EQ(swap("0::/outer/inner\n"), kAll);
  put("outer/inner/memory.swap.max", "max\n");
  put("outer/inner/memory.swap.current", "5\n");
  EXPECT_EQ(swap("0::/outer/inner\n"), kAll);
  put("outer/memory.swap.max", "0\n");
  put("outer/memory.swap.current", "0\n");
  EXPECT_EQ(swap("0::/outer/inner\n"), 0u);
  put("memory/box/memory.limit_in_bytes", "4000\n");
  put("memory/box/memory.usage_in_bytes", "3000\n");
  EXPECT_EQ(swap("5:memory:/box\n"), kAll);
  put("memory/box/memory.memsw.limit_in_bytes", "5000\n");
  put("memory/box/memory.memsw.usage_in_bytes", "3400\n");
  EXPECT_EQ(swap("5:memory:/box\n"), 600u);  // 1,000 may be swapped, 400 are
  put("memory/box/memory.limit_in_bytes", "9223372036854771712\n");
  put("memory/box/memory.memsw.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(swap("5:memory:/box\n"), kAll);
}

TEST(MemoryAllowed, IsWhatIsFreeUnlessAskedOtherwise) {
  EXPECT_EQ(memory_allowed("", 900, ""), 900u);
  EXPECT_EQ(memory_allowed("", 900, "3"), 300u);
  EXPECT_EQ(memory_allowed("", 900, "0"), 900u);
  EXPECT_EQ(memory_allowed("", 900, "many"), 900u);
  EXPECT_EQ(memory_allowed("", std::nullopt, "2"), std::nullopt);
  EXPECT_EQ(memory_allowed("none", 900, "3"), std::nullopt);
  EXPECT_EQ(memory_allowed("5", 900, "3"), 5u << 20);
  for (const char* wrong : {"0", "-1", "5 GB", "None", "99999999999999999999", "17592186044415"}) {
    EXPECT_CONTAINS(error_text<std::invalid_argument>([&] { memory_allowed(wrong, 900, ""); }), "expected megabytes, or none");
  }
}

}  // namespace
}  // namespace latte::formats
