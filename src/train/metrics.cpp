#include "dualpipe/train/metrics.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/run_log.hpp"

namespace dualpipe {
namespace {

[[noreturn]] void throw_metrics_error(const std::string& path, int error) {
  throw InvalidArgument(detail::str("cannot write ", path, ": ", std::generic_category().message(error)));
}

/// The shortest text that is read back as the same number.
std::string exact_json(double value) {
  if (!std::isfinite(value)) return "null";
  std::array<char, 32> text{};
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), value).ptr};
}

/// The lines up to `last_step`. @throws InvalidArgument  lines that are no metrics.
std::string_view lines_until(std::string_view text, const std::string& path, std::int64_t last_step) {
  const std::size_t end = text.rfind('\n');
  const std::string_view whole = text.substr(0, end == std::string_view::npos ? 0 : end + 1);
  std::size_t kept = 0;
  for (const std::int64_t step : planner::read_run_log(whole, path).steps) {
    if (step > last_step) break;
    kept = whole.find('\n', kept) + 1;
  }
  return whole.substr(0, kept);
}

}  // namespace

MetricsWriter::MetricsWriter(std::string path, std::int64_t last_step) : path_(std::move(path)), last_step_(last_step) {
  std::error_code ignored;
  if (last_step >= 0 && std::filesystem::exists(path_, ignored)) {
    const std::string text = detail::read_file(path_);
    const std::string_view kept = lines_until(text, path_, last_step);
    // As a new file, a resumed one replaces a symbolic link.
    if (kept.size() < text.size() || std::filesystem::is_symlink(path_, ignored)) detail::write_file(path_, kept);
  } else {
    detail::write_file(path_, "");
  }
  file_ = ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NOFOLLOW);
  if (file_ < 0) throw_metrics_error(path_, errno);
}

MetricsWriter::~MetricsWriter() {
  if (file_ >= 0) ::close(file_);
}

void MetricsWriter::write(const StepMetrics& metrics) {
  DUALPIPE_CHECK(metrics.step >= 0 && metrics.step > last_step_, "metrics of step ", metrics.step,
                 " come after those of step ", last_step_);
  const std::string line = detail::str("{\"step\":", metrics.step, ",\"loss\":", exact_json(metrics.loss),
                                       ",\"learning_rate\":", exact_json(metrics.learning_rate),
                                       ",\"gradient_norm\":", exact_json(metrics.gradient_norm),
                                       ",\"tokens_per_second\":", exact_json(metrics.tokens_per_second), "}\n");
  for (std::string_view rest = line; !rest.empty();) {
    const ssize_t count = ::write(file_, rest.data(), rest.size());
    if (count < 0 && errno != EINTR) throw_metrics_error(path_, errno);
    if (count > 0) rest.remove_prefix(static_cast<std::size_t>(count));
  }
  last_step_ = metrics.step;
}

}  // namespace dualpipe
