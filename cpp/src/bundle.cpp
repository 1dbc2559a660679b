#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "failure.h"
#include "json.h"

namespace runner {
namespace {

namespace fs = std::filesystem;
using json::Value;

// As in the reader of llm-coreml: no manifest is larger.
constexpr std::uintmax_t kLargestManifest = 1 << 22;
constexpr std::int64_t kLargestNumber = std::int64_t{1} << 53;

[[noreturn]] void refuse(const std::string& sentence) {
  throw Failure(Exit::wrong_bundle, sentence);
}

std::string read(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) {
    refuse("'" + path.string() + "' is no file; give the folder that an export wrote.");
  }
  const std::uintmax_t size = fs::file_size(path, error);
  if (error || size > kLargestManifest) {
    refuse("'" + path.string() + "' is larger than any manifest; export again.");
  }
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) {
    refuse("'" + path.string() + "' cannot be read; make it readable, or export again.");
  }
  return text;
}

// Reads members of objects, and throws std::runtime_error with the path of what is wrong.
class Fields {
 public:
  Fields(const Value& value, std::string path) : value_(value), path_(std::move(path)) {}

  Fields at(std::string_view key) const {
    const Value* found = value_.find(key);
    const std::string inner = path_ + "." + std::string(key);
    if (found == nullptr) throw std::runtime_error(inner + " is missing");
    return {*found, inner};
  }

  bool has(std::string_view key) const { return value_.find(key) != nullptr; }

  std::string text() const {
    const std::string* found = value_.as<std::string>();
    if (found == nullptr) throw std::runtime_error(path_ + " is no text");
    return *found;
  }

  std::int64_t number(std::int64_t least) const {
    const std::int64_t* found = value_.as<std::int64_t>();
    if (found == nullptr || *found < least || *found > kLargestNumber) {
      throw std::runtime_error(path_ + " is no whole number from " + std::to_string(least) + " on");
    }
    return *found;
  }

  std::vector<std::int64_t> numbers(std::int64_t least) const {
    const json::Array* found = value_.as<json::Array>();
    if (found == nullptr) throw std::runtime_error(path_ + " is no list");
    std::vector<std::int64_t> all;
    for (const Value& item : *found) all.push_back(Fields(item, path_ + "[]").number(least));
    return all;
  }

  std::vector<std::pair<std::string, Fields>> members() const {
    const json::Object* found = value_.as<json::Object>();
    if (found == nullptr) throw std::runtime_error(path_ + " is no object");
    std::vector<std::pair<std::string, Fields>> all;
    for (const json::Member& member : *found) {
      all.emplace_back(member.key, Fields(member.value, path_ + "[]"));
    }
    return all;
  }

 private:
  const Value& value_;
  std::string path_;
};

Method method_of(std::string name, const Fields& fields) {
  Method method{std::move(name), fields.at("seq_lengths").numbers(1)};
  std::ranges::sort(method.lengths);
  return method;
}

Bundle bundle_of(const fs::path& folder, const Fields& manifest) {
  const Fields program = manifest.at("program");
  const Fields constants = program.at("constant_methods");
  Bundle bundle{
      .program = folder / "model.pte",
      .bytes = program.at("bytes").number(1),
      .sha256 = program.at("sha256").text(),
      .backend = manifest.at("target").at("backend").text(),
      .methods = {},
      .context = constants.at("get_max_context_len").number(1),
      .vocabulary = constants.at("get_vocab_size").number(1),
      .stop = {},
  };
  if (constants.has("get_eos_ids")) bundle.stop = constants.at("get_eos_ids").numbers(0);
  if (program.has("methods")) {
    for (auto& [name, fields] : program.at("methods").members()) {
      bundle.methods.push_back(method_of(name, fields));
    }
  } else {  // the first releases tell of one method alone
    bundle.methods.push_back(method_of(program.at("method").text(), program));
  }
  const auto reads_none = [](const Method& method) { return method.lengths.empty(); };
  if (bundle.methods.empty() || std::ranges::any_of(bundle.methods, reads_none)) {
    throw std::runtime_error("$.program.methods has one that reads no tokens, or none");
  }
  bundle.ranged = program.has("form") && program.at("form").text() == "range";
  if (bundle.backend != "coreml" && bundle.backend != "xnnpack") {
    throw std::runtime_error("$.target.backend is neither coreml nor xnnpack");
  }
  if (bundle.sha256.size() != 64 ||
      bundle.sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
    throw std::runtime_error("$.program.sha256 is no SHA-256");
  }
  return bundle;
}

}  // namespace

std::vector<std::int64_t> Bundle::split(std::int64_t count) const {
  std::vector<std::int64_t> lengths;
  for (const Method& method : methods) {
    lengths.insert(lengths.end(), method.lengths.begin(), method.lengths.end());
  }
  std::ranges::sort(lengths, std::greater{});
  if (ranged) lengths.resize(1);
  std::vector<std::int64_t> parts;
  for (const std::int64_t length : lengths) {
    for (; count >= length; count -= length) parts.push_back(length);
  }
  if (count > 0) parts.push_back(count);
  return parts;
}

const Method& Bundle::method_for(std::int64_t length) const {
  const Method* best = &methods.front();
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const Method& method : methods) {
    const auto own = std::ranges::lower_bound(method.lengths, length);
    if (own != method.lengths.end() && *own < least) {
      least = *own;
      best = &method;
    }
  }
  return *best;
}

Bundle open_bundle(const fs::path& folder) {
  const fs::path manifest = folder / "manifest.json";
  const std::string text = read(manifest);
  Bundle bundle;
  try {
    bundle = bundle_of(folder, Fields(json::parse(text), "$"));
  } catch (const std::runtime_error& error) {
    refuse("'" + manifest.string() + "' is damaged: " + error.what() + "; export again.");
  }
  std::error_code error;
  const std::uintmax_t size = fs::file_size(bundle.program, error);
  if (error) refuse("'" + bundle.program.string() + "' is not there; export again.");
  if (size != static_cast<std::uintmax_t>(bundle.bytes)) {
    refuse("'" + bundle.program.string() + "' has " + std::to_string(size) +
           " bytes, and the manifest tells of " + std::to_string(bundle.bytes) +
           "; export again, or copy it again if it was transferred.");
  }
  return bundle;
}

}  // namespace runner
