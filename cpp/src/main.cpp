// llm-coreml-runner: a bundle on ExecuTorch, from tokens to tokens.

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <exception>
#include <iostream>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "bundle.h"
#include "failure.h"
#include "model.h"
#include "report.h"
#include "sampler.h"

namespace runner {
namespace {

using Clock = std::chrono::steady_clock;

// ExecuTorch and its backends trust what stands in a program, and a damaged one may crash them.
void tell_of_crashes() {
  for (const int signal : {SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV}) {
    std::signal(signal, [](int) {
      constexpr std::string_view kSentence =
          "The program crashed ExecuTorch: it is damaged inside; export it again, or copy it again "
          "if it was transferred.\n";
      const auto written = write(STDERR_FILENO, kSentence.data(), kSentence.size());
      _exit(static_cast<int>(written < 0 ? Exit::wrong_output : Exit::wrong_bundle));
    });
  }
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Reads the prompt from a reset, and adds tokens until a stop token, the count or a full context.
Run generate(Model& model, const Bundle& bundle, const Arguments& given,
             const std::vector<std::int64_t>& prompt) {
  Sampler sampler(given.sampling);
  Run run;
  model.reset();
  auto start = Clock::now();
  std::int64_t token = sampler.choose(model.feed(prompt));
  run.first_seconds = seconds_since(start);
  start = Clock::now();
  const auto ends = [&](const std::vector<std::int64_t>& ids) {
    return std::ranges::find(ids, token) != ids.end();
  };
  while (true) {
    if (ends(bundle.stop) || ends(given.stop)) {
      run.finish = "stop";
      break;
    }
    run.ids.push_back(token);
    if (static_cast<std::int64_t>(run.ids.size()) == given.max_new_tokens) {
      run.finish = "length";
      break;
    }
    if (model.position() == bundle.context) {
      run.finish = "context";
      break;
    }
    token = sampler.choose(model.feed({&token, 1}));
    ++run.decoded;
  }
  run.decode_seconds = seconds_since(start);
  return run;
}

void work(const Arguments& given) {
  const Bundle bundle = open_bundle(given.bundle);
  const std::vector<std::int64_t> prompt = read_prompt(given.ids, bundle);
  const auto start = Clock::now();
  Model model(bundle);
  Report report{bundle, given.sampling, prompt, seconds_since(start), {}};
  for (std::int64_t at = 0; at < given.warm_up; ++at) generate(model, bundle, given, prompt);
  for (std::int64_t at = 0; at < given.runs; ++at) {
    report.runs.push_back(generate(model, bundle, given, prompt));
  }
  std::cout << to_json(report) << std::flush;
  if (!std::cout) throw Failure(Exit::wrong_output, "The result cannot be printed.");
}

}  // namespace
}  // namespace runner

int main(int count, char** words) {
  int code = 1;
  try {
    const runner::Arguments given = runner::parse_arguments(count, words);
    if (given.help) {
      std::cout << runner::kHelp;
      return 0;
    }
    runner::tell_of_crashes();
    if (!given.verbose) runner::silence_executorch();
    runner::work(given);
    return 0;
  } catch (const runner::Failure& failure) {
    std::cerr << failure.what() << "\n";
    code = failure.code();
  } catch (const std::exception& error) {
    std::cerr << "The runner failed: " << error.what() << ".\n";
  }
  return code;
}
