#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <utility>

namespace runner::json {
namespace {

constexpr int kDeepest = 32;

void append_utf8(std::string& out, std::uint32_t code) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | (code >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | (code >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value whole() {
    Value value = any(0);
    if (peek() != '\0' || at_ < text_.size()) fail("something follows the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(what + " at byte " + std::to_string(at_));
  }

  // The next character that is no white space, which stays; NUL at the end.
  char peek() {
    at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size());
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool take(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!take(wanted)) fail(std::string("no '") + wanted + "'");
  }

  Value any(int depth) {
    if (depth > kDeepest) fail("it nests deeper than " + std::to_string(kDeepest) + " levels");
    switch (peek()) {
      case '{': return {object(depth)};
      case '[': return {array(depth)};
      case '"': return {string()};
      case 't': return word("true", {true});
      case 'f': return word("false", {false});
      case 'n': return word("null", {nullptr});
      default: return number();
    }
  }

  Value word(std::string_view expected, Value value) {
    if (!text_.substr(at_).starts_with(expected)) fail("no value");
    at_ += expected.size();
    return value;
  }

  Object object(int depth) {
    Object members;
    std::set<std::string> keys;
    expect('{');
    if (take('}')) return members;
    do {
      if (peek() != '"') fail("no key");
      std::string key = string();
      if (!keys.insert(key).second) fail("a key stands twice in its object");
      expect(':');
      members.push_back({std::move(key), any(depth + 1)});
    } while (take(','));
    expect('}');
    return members;
  }

  Array array(int depth) {
    Array items;
    expect('[');
    if (take(']')) return items;
    do items.push_back(any(depth + 1));
    while (take(','));
    expect(']');
    return items;
  }

  std::string string() {
    std::string out;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character in a string");
      if (text_[at_] == '\\') {
        escape(out);
      } else {
        out += text_[at_];
      }
    }
    if (at_ == text_.size()) fail("a string without an end");
    ++at_;
    return out;
  }

  // From a backslash to the last character of its escape.
  void escape(std::string& out) {
    constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const char letter = ++at_ < text_.size() ? text_[at_] : '\0';
    if (letter == 'u') {
      std::uint32_t code = hexadecimal();
      if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_ + 1).starts_with("\\u")) {
        at_ += 2;
        const std::uint32_t low = hexadecimal();
        if (low < 0xdc00 || low >= 0xe000) fail("half a character");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      }
      if (code >= 0xd800 && code < 0xe000) fail("half a character");
      return append_utf8(out, code);
    }
    const std::size_t found = kLetters.find(letter);
    if (letter == '\0' || found == std::string_view::npos) fail("an unknown escape");
    out += kMeanings[found];
  }

  std::uint32_t hexadecimal() {
    const std::string_view digits = text_.substr(std::min(at_ + 1, text_.size()), 4);
    std::uint32_t code = 0;
    const char* end = digits.data() + digits.size();
    const auto [last, error] = std::from_chars(digits.data(), end, code, 16);
    if (digits.size() < 4 || error != std::errc() || last != end) fail("an unknown escape");
    at_ += 4;
    return code;
  }

  Value number() {
    const std::size_t end = text_.find_first_not_of("+-.0123456789eE", at_);
    const std::string digits(text_.substr(at_, std::min(end, text_.size()) - at_));
    if (digits.empty()) fail("no value");
    const char* const last = digits.data() + digits.size();
    if (digits.find_first_of(".eE") == std::string::npos) {
      std::int64_t whole = 0;
      const auto [read, error] = std::from_chars(digits.data(), last, whole);
      if (error != std::errc() || read != last) fail("no number of 64 bits");
      at_ += digits.size();
      return {whole};
    }
    char* read = nullptr;  // from_chars for floats is missing in older libraries of Apple's
    const double value = std::strtod(digits.c_str(), &read);
    if (read != last || !std::isfinite(value)) fail("no finite number");
    at_ += digits.size();
    return {value};
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const Value* Value::find(std::string_view key) const {
  const Object* members = as<Object>();
  if (members == nullptr) return nullptr;
  const auto same = [&](const Member& member) { return member.key == key; };
  const auto found = std::ranges::find_if(*members, same);
  return found == members->end() ? nullptr : &found->value;
}

Value parse(std::string_view text) { return Parser(text).whole(); }

std::string quoted(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string out = "\"";
  for (const char letter : text) {
    const auto code = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') {
      out += '\\';
      out += letter;
    } else if (code < 0x20) {
      out += "\\u00";
      out += kDigits[code >> 4];
      out += kDigits[code & 15];
    } else {
      out += letter;
    }
  }
  return out + '"';
}

}  // namespace runner::json
