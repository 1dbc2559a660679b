#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <string_view>

#include "failure.h"

namespace runner {

const char* const kHelp =
    R"(llm-coreml-runner BUNDLE [options]

Runs the program of a bundle on ExecuTorch, and prints one JSON object: the tokens, how long they
took, and the memory that it needed. `llm-coreml eval BUNDLE --import` takes that object.

  --ids FILE            the prompt's tokens, separated by white space or commas  [stdin]
  --max-new-tokens N    most tokens to add  [64]
  --temperature T       0 is greedy  [0]
  --top-p P             share of probability to draw from  [1]
  --seed N              the same one draws the same tokens  [0]
  --stop ID,ID,...      further tokens that end the text
  --runs N              how often it is done, from a reset each time; times are medians  [1]
  --warm-up N           runs before these, which are not timed  [0]
  --verbose             show what ExecuTorch logs

Exit codes: 0 done; 2 a wrong option or prompt; 6 no output; 7 a bundle that cannot be run.
)";

namespace {

[[noreturn]] void refuse(const std::string& sentence) {
  throw Failure(Exit::wrong_request, sentence);
}

std::int64_t whole_number(std::string_view flag, std::string_view text, std::int64_t least,
                          std::int64_t most) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error != std::errc() || last != end || value < least || value > most) {
    refuse(std::string(flag) + " takes a whole number from " + std::to_string(least) + " to " +
           std::to_string(most) + ".");
  }
  return value;
}

double real_number(std::string_view flag, const std::string& text, bool zero, double most) {
  char* last = nullptr;
  const double value = std::strtod(text.c_str(), &last);
  // NaN is in no range.
  const bool inside = (zero ? value >= 0 : value > 0) && value <= most;
  if (text.empty() || *last != '\0' || !inside) {
    refuse(std::string(flag) + (zero ? " takes a finite number of 0 or more."
                                     : " takes a number above 0 and at most 1."));
  }
  return value;
}

std::vector<std::int64_t> listed(std::string_view flag, std::string_view text) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int64_t> all;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    all.push_back(whole_number(flag, text.substr(begin, end - begin), 0, kMost));
    begin = end + 1;
  }
  return all;
}

}  // namespace

Arguments parse_arguments(int count, const char* const* words) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  constexpr double kFinite = std::numeric_limits<double>::max();
  Arguments given;
  const std::map<std::string_view, std::function<void(const std::string&)>> options{
      {"--ids", [&](auto& text) { given.ids = text; }},
      {"--max-new-tokens",
       [&](auto& text) {
         given.max_new_tokens = whole_number("--max-new-tokens", text, 1, kMost);
       }},
      {"--temperature",
       [&](auto& text) {
         given.sampling.temperature = real_number("--temperature", text, true, kFinite);
       }},
      {"--top-p",
       [&](auto& text) { given.sampling.top_p = real_number("--top-p", text, false, 1); }},
      {"--seed",
       [&](auto& text) {
         constexpr auto kLargest = std::numeric_limits<std::int64_t>::max();
         const std::int64_t seed = whole_number("--seed", text, 0, kLargest);
         given.sampling.seed = static_cast<std::uint64_t>(seed);
       }},
      {"--stop", [&](auto& text) { given.stop = listed("--stop", text); }},
      {"--runs", [&](auto& text) { given.runs = whole_number("--runs", text, 1, 1000); }},
      {"--warm-up", [&](auto& text) { given.warm_up = whole_number("--warm-up", text, 0, 1000); }},
  };
  for (int at = 1; at < count; ++at) {
    const std::string word = words[at];
    if (word == "--help") {
      given.help = true;
    } else if (word == "--verbose") {
      given.verbose = true;
    } else if (const auto found = options.find(word); found != options.end()) {
      if (++at == count) refuse(word + " takes a value; see --help.");
      found->second(words[at]);
    } else if (word.starts_with("-") || !given.bundle.empty()) {
      refuse("'" + word + "' is no option of the runner; see --help.");
    } else {
      given.bundle = word;
    }
  }
  if (given.bundle.empty() && !given.help) refuse("Give the folder of a bundle; see --help.");
  return given;
}

std::vector<std::int64_t> read_prompt(const std::string& ids, const Bundle& bundle) {
  std::ifstream file;
  if (ids != "-") {
    file.open(ids);
    if (!file || std::filesystem::is_directory(ids)) {
      refuse("'" + ids + "' cannot be read; give a file of tokens to --ids.");
    }
  }
  std::istream& source = ids == "-" ? std::cin : file;
  std::vector<std::int64_t> tokens;
  std::string word;
  const auto take = [&] {
    if (word.empty()) return;
    std::int64_t token = 0;
    const char* end = word.data() + word.size();
    const auto [last, error] = std::from_chars(word.data(), end, token);
    const std::string place = "Token " + std::to_string(tokens.size() + 1) + " of the prompt is ";
    if (error != std::errc() || last != end) refuse(place + "no whole number.");
    if (token < 0 || token >= bundle.vocabulary) {
      refuse(place + std::to_string(token) + ", outside the vocabulary of " +
             std::to_string(bundle.vocabulary) + " entries; use the model's own tokenizer.");
    }
    if (static_cast<std::int64_t>(tokens.size()) == bundle.context) {
      refuse("The prompt is longer than the context of " + std::to_string(bundle.context) +
             " positions; give fewer tokens, or export with a larger --context.");
    }
    tokens.push_back(token);
    word.clear();
  };
  constexpr std::size_t kLongestWord = 32;
  for (std::istreambuf_iterator<char> letter(source), end; letter != end; ++letter) {
    if (std::string_view(" \t\r\n,").find(*letter) != std::string_view::npos) {
      take();
    } else if (word.size() == kLongestWord) {
      refuse("Token " + std::to_string(tokens.size() + 1) + " of the prompt is no whole number.");
    } else {
      word += *letter;
    }
  }
  take();
  if (tokens.empty()) refuse("There are no tokens in the prompt; give at least one.");
  return tokens;
}

}  // namespace runner
