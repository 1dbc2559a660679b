// What a run found, as the JSON that `llm-coreml eval --import` takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "sampler.h"

namespace runner {

// One pass over the prompt, and the tokens after it.
struct Run {
  std::vector<std::int64_t> ids;
  std::string finish;          // "stop", "length" or "context"
  double first_seconds = 0;    // until the first token was chosen
  double decode_seconds = 0;   // of all calls after that
  std::int64_t decoded = 0;    // how many these were
};

struct Report {
  const Bundle& bundle;
  const Sampling& sampling;
  const std::vector<std::int64_t>& prompt;
  double load_seconds;
  std::vector<Run> runs;  // one at least; the first one's tokens are told
};

// The most memory that this process had, mapped files included.
std::int64_t peak_memory_bytes();

std::string to_json(const Report& report);

}  // namespace runner
