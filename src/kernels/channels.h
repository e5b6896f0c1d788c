// How the kernels that run along time (convolution, RG-LRU) split their work: one slice per sequence and block of channels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace latte::kernels {

// 64 floats are four cache lines, so that neighbouring slices seldom share one, and few enough that a model's channels feed many
// threads. A multiple of every vector length up to 2048 bits.
constexpr int64_t kChannelBlock = 64;

struct ChannelSlice {
  int64_t sequence;
  int64_t channel;  // first channel
  int64_t count;    // channels in the block, 1 … kChannelBlock
};

inline int64_t ChannelSlices(int64_t sequences, int64_t channels) {
  return sequences * ((channels + kChannelBlock - 1) / kChannelBlock);
}

inline ChannelSlice ChannelSliceAt(int64_t slice, int64_t channels) {
  const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t channel = slice % blocks * kChannelBlock;
  return {slice / blocks, channel, std::min(kChannelBlock, channels - channel)};
}

}  // namespace latte::kernels
