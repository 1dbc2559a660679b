#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "failure.h"

namespace runner {

std::int64_t Sampler::choose(std::span<const float> logits) {
  const auto largest = std::ranges::max_element(logits);
  // A token may be ruled out by -inf, but not all of them, and none is beyond all bounds.
  const auto is_nan = [](float value) { return std::isnan(value); };
  if (std::ranges::any_of(logits, is_nan) || !std::isfinite(*largest)) {
    throw Failure(Exit::wrong_bundle,
                  "The program's logits are no numbers (NaN or inf); `llm-coreml inspect "
                  "--numerics` finds where that begins.");
  }
  if (sampling_.temperature == 0) return largest - logits.begin();
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t id) { return logits[id]; });
  // The largest at zero, so that no temperature is too small to divide by.
  std::vector<double> shares(order.size());
  std::ranges::transform(order, shares.begin(), [&](std::size_t id) {
    return std::exp((double{logits[id]} - double{*largest}) / sampling_.temperature);
  });
  const double all = std::reduce(shares.begin(), shares.end());
  // The token that crosses the threshold still belongs to the nucleus.
  double nucleus = 0;
  std::size_t kept = 0;
  while (kept < shares.size() && nucleus < sampling_.top_p * all) nucleus += shares[kept++];
  // 53 bits, as std::uniform_real_distribution differs between libraries.
  double left = std::ldexp(static_cast<double>(engine_() >> 11), -53) * nucleus;
  std::size_t drawn = 0;
  while (drawn + 1 < kept && left >= shares[drawn]) left -= shares[drawn++];
  return static_cast<std::int64_t>(order[drawn]);
}

}  // namespace runner
