// What ends the runner: a sentence for people, and an exit code for scripts.
#pragma once

#include <stdexcept>
#include <string>

namespace runner {

// As in the errors of llm-coreml, so that a script needs one table of codes.
enum class Exit : int { wrong_request = 2, wrong_output = 6, wrong_bundle = 7 };

class Failure : public std::runtime_error {
 public:
  Failure(Exit code, const std::string& sentence) : std::runtime_error(sentence), code_(code) {}

  int code() const noexcept { return static_cast<int>(code_); }

 private:
  Exit code_;
};

}  // namespace runner
