#include "report.h"

#include <sys/resource.h>
#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "json.h"

namespace runner {
namespace {

std::optional<double> median(std::vector<double> values) {
  if (values.empty()) return std::nullopt;
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::string number(std::optional<double> value) {
  if (!value) return "null";
  std::ostringstream out;
  out.precision(9);
  out << *value;
  return out.str();
}

std::string list(const std::vector<std::int64_t>& values) {
  std::string out = "[";
  for (const std::int64_t value : values) {
    out += (out.size() > 1 ? ", " : "") + std::to_string(value);
  }
  return out + "]";
}

std::string system() {
  utsname names{};
  if (uname(&names) != 0) return "unknown";
  return std::string(names.sysname) + " " + names.release + " " + names.machine;
}

}  // namespace

// Not by getrusage on Linux, where a process begins with the peak of the one that started it.
std::int64_t peak_memory_bytes() {
#ifdef __APPLE__
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
#else
  std::ifstream status("/proc/self/status");
  constexpr std::string_view kPeak = "VmHWM:";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kPeak)) return std::stoll(line.substr(kPeak.size())) * 1024;
  }
  return 0;
#endif
}

std::string to_json(const Report& report) {
  std::vector<double> first, speed;
  bool agree = true;
  for (const Run& run : report.runs) {
    first.push_back(run.first_seconds);
    if (run.decoded > 0) speed.push_back(static_cast<double>(run.decoded) / run.decode_seconds);
    agree = agree && run.ids == report.runs.front().ids;
  }
  const Run& told = report.runs.front();
  std::ostringstream out;
  out << "{\n"
      << "  \"version\": 1,\n"
      << "  \"runner\": \"cpp\",\n"
      << "  \"executorch\": " << json::quoted(EXECUTORCH_VERSION) << ",\n"
      << "  \"system\": " << json::quoted(system()) << ",\n"
      << "  \"backend\": " << json::quoted(report.bundle.backend) << ",\n"
      << "  \"program_sha256\": " << json::quoted(report.bundle.sha256) << ",\n"
      << "  \"sampling\": {\"temperature\": " << number(report.sampling.temperature)
      << ", \"top_p\": " << number(report.sampling.top_p)
      << ", \"seed\": " << report.sampling.seed << "},\n"
      << "  \"prompt_ids\": " << list(report.prompt) << ",\n"
      << "  \"ids\": " << list(told.ids) << ",\n"
      << "  \"finish\": " << json::quoted(told.finish) << ",\n"
      << "  \"runs\": " << report.runs.size() << ",\n"
      << "  \"runs_agree\": " << (agree ? "true" : "false") << ",\n"
      << "  \"load_seconds\": " << number(report.load_seconds) << ",\n"
      << "  \"time_to_first_token_seconds\": " << number(median(first)) << ",\n"
      << "  \"tokens_per_second\": " << number(median(speed)) << ",\n"
      << "  \"peak_memory_bytes\": " << peak_memory_bytes() << "\n"
      << "}\n";
  return out.str();
}

}  // namespace runner
