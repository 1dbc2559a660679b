#include "model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <string>
#include <utility>

#include "failure.h"

namespace runner {

using executorch::aten::ScalarType;
using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

[[noreturn]] void refuse(const Bundle& bundle, const std::string& reason) {
  throw Failure(Exit::wrong_bundle, "'" + bundle.program.string() + "' " + reason);
}

[[noreturn]] void refuse(const Bundle& bundle, const std::string& done, Error error) {
  refuse(bundle, "cannot be " + done + " by ExecuTorch (" +
                     executorch::runtime::to_string(error) +
                     "); export it again, or copy it again if it was transferred.");
}

void check_backend(const Bundle& bundle) {
#ifndef WITH_COREML
  if (bundle.backend == "coreml") {
    refuse(bundle, "is for Core ML, which this runner was built without; run it on macOS, or "
                   "export with --backend xnnpack.");
  }
#endif
#ifndef WITH_XNNPACK
  if (bundle.backend == "xnnpack") {
    refuse(bundle, "is for XNNPACK, which this runner was built without.");
  }
#endif
}

}  // namespace

class Model::Engine {
 public:
  explicit Engine(const Bundle& bundle)
      : bundle_(bundle),
        module_(bundle.program.string(), Module::LoadMode::MmapUseMlockIgnoreErrors) {
    check(module_.load(), "read");
    check_constant("get_max_context_len", {bundle.context});
    check_constant("get_vocab_size", {bundle.vocabulary});
    check_constant("get_eos_ids", bundle.stop);
    for (const Method& method : bundle.methods) check(module_.load_method(method.name), "loaded");
  }

  // Returns all rows of logits of a call, float [1 or S, vocabulary].
  std::span<const float> call(const Method& method, std::span<const std::int64_t> tokens,
                              std::int64_t position) {
    std::vector<std::int64_t> ids(tokens.begin(), tokens.end());
    const auto count = static_cast<executorch::aten::SizesType>(ids.size());
    const auto given = make_tensor_ptr({1, count}, std::move(ids));
    const auto start = make_tensor_ptr({1}, std::vector<std::int64_t>{position});
    const auto result = module_.execute(method.name, {EValue(*given), EValue(*start)});
    check(result.error(), "run");
    if (result->size() != 1 || !result->front().isTensor()) refuse(bundle_, "gives no logits.");
    const auto& logits = result->front().toTensor();
    const auto rows = logits.numel() / bundle_.vocabulary;
    if (logits.scalar_type() != ScalarType::Float || logits.dim() != 3 ||
        logits.size(2) != bundle_.vocabulary || (rows != 1 && rows != count)) {
      refuse(bundle_, "gives no float32 logits of its vocabulary; export it again.");
    }
    return {logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())};
  }

 private:
  void check(Error error, const std::string& done) {
    if (error != Error::Ok) refuse(bundle_, done, error);
  }

  // Holds what the manifest tells against what the program gives runners.
  void check_constant(const std::string& name, const std::vector<std::int64_t>& told) {
    const auto names = module_.method_names();
    check(names.error(), "read");
    std::vector<std::int64_t> found;
    if (names->contains(name)) {
      const auto result = module_.execute(name);
      check(result.error(), "asked for " + name);
      for (const EValue& value : *result) {
        if (!value.isInt()) refuse(bundle_, "gives no whole numbers as " + name + ".");
        found.push_back(value.toInt());
      }
    }
    if (found != told) {
      refuse(bundle_, "is not what the manifest describes, by its " + name + "; export it again.");
    }
  }

  const Bundle& bundle_;
  Module module_;
};

Model::Model(const Bundle& bundle) : bundle_(bundle) {
  check_backend(bundle);
  engine_ = std::make_unique<Engine>(bundle);
}

Model::~Model() = default;

std::span<const float> Model::feed(std::span<const std::int64_t> tokens) {
  std::span<const float> row;
  while (!tokens.empty()) {
    const auto [method, length] = bundle_.call_for(static_cast<std::int64_t>(tokens.size()));
    row = step(tokens.first(static_cast<std::size_t>(length)), *method);
    tokens = tokens.subspan(static_cast<std::size_t>(length));
  }
  return row;
}

std::span<const float> Model::step(std::span<const std::int64_t> tokens, const Method& method) {
  const std::span<const float> rows = engine_->call(method, tokens, position_);
  position_ += static_cast<std::int64_t>(tokens.size());
  return rows.last(static_cast<std::size_t>(bundle_.vocabulary));
}

void silence_executorch() {
  using executorch::runtime::PalImpl;
  const auto quiet = [](et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t,
                        const char*, size_t) {};
  executorch::runtime::register_pal(PalImpl::create(quiet, __FILE__));
}

}  // namespace runner
