// A bundle, as its manifest tells of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace runner {

// A method that reads tokens.
struct Method {
  std::string name;
  std::vector<std::int64_t> lengths;  // of a call, ascending
};

struct Bundle {
  std::filesystem::path program;
  std::int64_t bytes;
  std::string sha256;
  std::string backend;  // "coreml" or "xnnpack"
  std::vector<Method> methods;
  std::int64_t context;  // positions that the program remembers
  std::int64_t vocabulary;
  std::vector<std::int64_t> stop;  // tokens that end a text

  // The largest length that is at most `count`, and the method that takes it.
  struct Call {
    const Method* method;
    std::int64_t length;
  };
  Call call_for(std::int64_t count) const;
};

// Reads the manifest in `folder`. Throws Failure where it is absent, damaged, or another program's.
Bundle open_bundle(const std::filesystem::path& folder);

}  // namespace runner
