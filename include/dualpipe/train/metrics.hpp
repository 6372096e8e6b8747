#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace dualpipe {

/// Of one step. NaN: not known.
struct StepMetrics {
  std::int64_t step = 0;  ///< >= 0
  double loss = std::numeric_limits<double>::quiet_NaN();
  double learning_rate = std::numeric_limits<double>::quiet_NaN();
  double gradient_norm = std::numeric_limits<double>::quiet_NaN();
  double tokens_per_second = std::numeric_limits<double>::quiet_NaN();
};

/// Writes a line of JSON per step, which `dualpipe-plan plot` draws:
///   {"step":12,"loss":1.5,"learning_rate":0.001,"gradient_norm":0.7,"tokens_per_second":1200}
/// Numbers have all digits, so that they are read back as they were; those that are not finite are null. A line is in
/// the file when write() returns. One rank writes.
class MetricsWriter {
 public:
  /// @param last_step  where the run goes on from, as load_checkpoint tells. Lines of later steps in the file, which a
  ///                   stopped run has left, are cut, and so is a last line that is not whole. -1: the file begins anew.
  /// @throws InvalidArgument  a file that cannot be written, or that holds something else; the line is named.
  explicit MetricsWriter(std::string path, std::int64_t last_step = -1);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  /// @throws InvalidArgument  a step that is not greater than that before, or a file that cannot be written.
  void write(const StepMetrics& metrics);

 private:
  std::string path_;
  int file_ = -1;
  std::int64_t last_step_ = -1;
};

}  // namespace dualpipe
