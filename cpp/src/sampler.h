// Choosing the next token from a row of logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace runner {

struct Sampling {
  double temperature = 0;  // 0 takes the most likely token
  double top_p = 1;        // share of probability to draw from, most likely tokens first
  std::uint64_t seed = 0;
};

// The nucleus of arXiv 1904.09751; a seed draws the same on every machine with the same logits,
// and not what the Python package draws by it.
class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), engine_(sampling.seed) {}

  // Throws Failure where a logit is NaN.
  std::int64_t choose(std::span<const float> logits);

 private:
  Sampling sampling_;
  std::mt19937_64 engine_;
};

}  // namespace runner
