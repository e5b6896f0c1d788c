// Saved states: whatever a file holds, it is refused with an error, or is a state that can be read on, copied and saved. Model
// and checksum, which a fuzzer wouldn't hit, are put right in a second try.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/hash.h"
#include "input_file.h"
#include "runtime/error.h"
#include "state_models.h"

using namespace latte;

namespace {

void try_state(const std::string& bytes, const std::shared_ptr<const runtime::Model>& model, runtime::Engine& engine) {
  const std::string& path = fuzz::input_file(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  try {
    std::string note;
    runtime::Session session = runtime::Session::load(path, model, &note);
    if (note.size() > bytes.size()) std::abort();
    const int64_t position = session.position();
    runtime::Session copy = session;
    if (session.room() > 0) {
      engine.decode(session, 1);
      const int32_t tokens[] = {2, 3, 1};
      if (session.room() >= 3) engine.prefill(session, tokens);
    }
    if (copy.position() != position) std::abort();
    if (copy.can_truncate(position / 2)) copy.truncate(position / 2);
  } catch (const runtime::StateError&) {
  } catch (const runtime::MemoryError&) {
  } catch (const formats::FileError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto models = fuzz::state_models();
  static std::vector<std::unique_ptr<runtime::Engine>> engines = [] {
    std::vector<std::unique_ptr<runtime::Engine>> all;
    for (const auto& each : models)
      all.push_back(std::make_unique<runtime::Engine>(each.model, runtime::EngineOptions{1, {}, 16}));
    return all;
  }();
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  constexpr size_t kDigits = 32, kHeader = 80;  // the model's hash ends the header, the checksum the file
  for (size_t i = 0; i < models.size(); ++i) {
    try_state(bytes, models[i].model, *engines[i]);
    if (size < kHeader + kDigits) continue;
    std::string right = bytes;
    std::memcpy(right.data() + kHeader - kDigits, models[i].model->state_hash().data(), kDigits);
    const uint64_t content = size - kHeader - kDigits;
    const uint64_t note = std::min<uint64_t>(content, data[40] & 15);
    const uint64_t payload = content - note;
    std::memcpy(right.data() + 32, &payload, sizeof(payload));
    std::memcpy(right.data() + 40, &note, sizeof(note));
    formats::Hash hash;
    hash.add(std::as_bytes(std::span(right).first(size - kDigits)));
    const std::string digits = hash.digits();
    std::memcpy(right.data() + size - kDigits, digits.data(), kDigits);
    try_state(right, models[i].model, *engines[i]);
  }
  return 0;
}
