// The program of a bundle on ExecuTorch: a causal LM with a cache, fed in chunks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "bundle.h"

namespace runner {

class Model {
 public:
  // Loads all methods, which on Core ML compiles them for the device. Throws Failure where
  // ExecuTorch refuses the program, or it is not what the manifest tells.
  explicit Model(const Bundle& bundle);
  ~Model();

  // Begins a new sequence, by going back to position 0. States keep what is there: a program masks
  // every position at and behind the one it writes next, so that a token sees none of it before it
  // is written over. Loading the methods again would give zeros, which nobody sees either, and
  // costs seconds on a device. Caches that are passed from call to call become zeros, as at first.
  void reset();

  // Continues the sequence by `tokens`, as a sum of the program's lengths, the largest first, so
  // that nothing is padded. Returns the last row of logits, until the next call.
  std::span<const float> feed(std::span<const std::int64_t> tokens);

  std::int64_t position() const { return position_; }

 private:
  class Engine;

  const Bundle& bundle_;
  std::unique_ptr<Engine> engine_;
  std::int64_t position_ = 0;
};

// Keeps ExecuTorch from writing to stderr, which holds one sentence where something is wrong.
void silence_executorch();

}  // namespace runner
