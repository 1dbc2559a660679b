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
  bool ranged = false;             // lengths between the first and the last are taken, too

  // How `count` tokens are fed: a sum of the lengths, the largest first, and what is left. Nothing
  // is left where 1 is a length; else the program takes shorter calls, or pads them itself.
  std::vector<std::int64_t> split(std::int64_t count) const;

  // The method that takes `length` tokens with the fewest pads.
  const Method& method_for(std::int64_t length) const;
};

// Reads the manifest in `folder`. Throws Failure where it is absent, damaged, or another program's.
Bundle open_bundle(const std::filesystem::path& folder);

}  // namespace runner
