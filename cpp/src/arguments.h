// What the runner is asked to do.
#pragma once

#include <cstdint>
#include <filesystem>
#include <istream>
#include <string>
#include <vector>

#include "bundle.h"
#include "sampler.h"

namespace runner {

struct Arguments {
  std::filesystem::path bundle;
  std::string ids = "-";  // a file, or "-" for stdin
  std::int64_t max_new_tokens = 64;
  Sampling sampling;
  std::vector<std::int64_t> stop;  // beside the bundle's own
  std::int64_t runs = 1;
  std::int64_t warm_up = 0;
  bool verbose = false;
  bool help = false;
};

extern const char* const kHelp;

// Throws Failure where a flag is unknown, or a value out of its range.
Arguments parse_arguments(int count, const char* const* words);

// Returns tokens that are separated by white space or commas. Throws Failure where one is none of
// the vocabulary, there is none, or the context does not hold all.
std::vector<std::int64_t> read_prompt(const std::string& ids, const Bundle& bundle);

}  // namespace runner
