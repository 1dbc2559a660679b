#include "model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <cstring>
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
    make_caches();
  }

  void clear_caches() {
    for (Cache& cache : caches_) std::ranges::fill(cache.bytes, std::uint8_t{0});
  }

  // Returns all rows of logits of a call, float [1 or S, vocabulary].
  std::span<const float> call(const Method& method, std::span<const std::int64_t> tokens,
                              std::int64_t position) {
    std::vector<std::int64_t> ids(tokens.begin(), tokens.end());
    const auto count = static_cast<executorch::aten::SizesType>(ids.size());
    const auto given = make_tensor_ptr({1, count}, std::move(ids));
    const auto start = make_tensor_ptr({1}, std::vector<std::int64_t>{position});
    std::vector<EValue> inputs{EValue(*given), EValue(*start)};
    for (const Cache& cache : caches_) inputs.emplace_back(*cache.tensor);
    const auto result = module_.execute(method.name, inputs);
    check(result.error(), "run");
    if (result->size() != 1 + caches_.size() || !result->front().isTensor()) {
      refuse(bundle_, "gives no logits, or other caches than it takes; export it again.");
    }
    for (std::size_t at = 0; at < caches_.size(); ++at) pass_on((*result)[1 + at], caches_[at]);
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

  // What a program is given and gives back, where it has no states.
  struct Cache {
    std::vector<std::uint8_t> bytes;
    executorch::extension::TensorPtr tensor;
  };

  // Makes a cache of zeros for every argument behind tokens and position, the same for all methods.
  void make_caches() {
    for (const Method& method : bundle_.methods) {
      const auto meta = module_.method_meta(method.name);
      check(meta.error(), "read");
      if (&method != &bundle_.methods.front() && meta->num_inputs() != 2 + caches_.size()) {
        refuse(bundle_, "has methods that take different caches; export it again.");
      }
      for (std::size_t at = 2 + caches_.size(); at < meta->num_inputs(); ++at) {
        const auto told = meta->input_tensor_meta(at);
        check(told.error(), "read");
        const std::vector<executorch::aten::SizesType> sizes(told->sizes().begin(),
                                                             told->sizes().end());
        Cache& cache = caches_.emplace_back();
        cache.bytes.resize(told->nbytes());
        cache.tensor = make_tensor_ptr(sizes, cache.bytes.data(), told->scalar_type());
      }
    }
  }

  void pass_on(const EValue& given, Cache& cache) {
    if (!given.isTensor() || given.toTensor().nbytes() != cache.bytes.size()) {
      refuse(bundle_, "gives a cache of another size than it takes; export it again.");
    }
    // What a method gives may lie where the next one writes.
    std::memcpy(cache.bytes.data(), given.toTensor().const_data_ptr(), cache.bytes.size());
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
  std::vector<Cache> caches_;
};

Model::Model(const Bundle& bundle) : bundle_(bundle) {
  check_backend(bundle);
  engine_ = std::make_unique<Engine>(bundle);
}

Model::~Model() = default;

void Model::reset() {
  engine_->clear_caches();
  position_ = 0;
}

std::span<const float> Model::feed(std::span<const std::int64_t> tokens) {
  std::span<const float> rows;
  for (const std::int64_t length : bundle_.split(static_cast<std::int64_t>(tokens.size()))) {
    const auto count = static_cast<std::size_t>(length);
    rows = engine_->call(bundle_.method_for(length), tokens.first(count), position_);
    tokens = tokens.subspan(count);
    position_ += length;
  }
  return rows.last(static_cast<std::size_t>(bundle_.vocabulary));
}

void silence_executorch() {
  using executorch::runtime::PalImpl;
  const auto quiet = [](et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t,
                        const char*, size_t) {};
  executorch::runtime::register_pal(PalImpl::create(quiet, __FILE__));
}

}  // namespace runner
