// JSON as a manifest needs it: read with bounds, from a file that nobody vouches for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace runner::json {

struct Member;
struct Value;
using Array = std::vector<Value>;
using Object = std::vector<Member>;

struct Value {
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> held;

  // The member of an object; nullptr where there is none, or this is no object.
  const Value* find(std::string_view key) const;

  // The value as a T; nullptr where it is something else.
  template <typename T>
  const T* as() const {
    return std::get_if<T>(&held);
  }
};

struct Member {
  std::string key;
  Value value;
};

// Returns the value of a whole text. Throws std::runtime_error with what is wrong and at which
// byte: no JSON, a key twice in an object, a number of more than 64 bits, nesting beyond 32 levels.
Value parse(std::string_view text);

// Returns `text` in quotation marks, with escapes.
std::string quoted(std::string_view text);

}  // namespace runner::json
