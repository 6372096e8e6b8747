#pragma once

#include "dualpipe/detail/pipeline/flight_recorder.hpp"

#include <algorithm>
#include <chrono>
#include <iomanip>
#include <sstream>

#include "dualpipe/detail/comm/message.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// `text` in quotes. Bytes that are no ASCII, of which nobody knows whether they are UTF-8, become question marks.
inline std::string json_quoted(const std::string& text) {
  std::ostringstream out;
  out << '"';
  for (const char c : text) {
    if (c == '"' || c == '\\')
      out << '\\' << c;
    else if (static_cast<unsigned char>(c) < 0x20)
      out << "\\u" << std::hex << std::setw(4) << std::setfill('0') << static_cast<int>(c) << std::dec;
    else
      out << (static_cast<unsigned char>(c) < 0x80 ? c : '?');
  }
  out << '"';
  return std::move(out).str();
}

constexpr const char* recorded_kind(FlightRecorder::Kind kind) {
  switch (kind) {
    case FlightRecorder::Kind::compute:
      return "compute";
    case FlightRecorder::Kind::send:
      return "send";
    case FlightRecorder::Kind::receive:
      return "receive";
    case FlightRecorder::Kind::collective:
      return "collective";
    case FlightRecorder::Kind::together:
      break;
  }
  return "together";
}

/// "2F5 received from rank 1"
inline std::string recorded_text(const FlightRecorder::Operation& operation) {
  using Kind = FlightRecorder::Kind;
  if (operation.kind == Kind::together) return operation.name;
  const std::string op = to_string(operation.step.op) +
                         (operation.step.overlapped ? "&" + to_string(*operation.step.overlapped) : std::string());
  if (operation.kind == Kind::compute) return "compute " + op;
  if (operation.kind == Kind::collective) return "collective of " + op;
  std::string text = str(operation.kind == Kind::send ? "send " : "receive ", op,
                         operation.kind == Kind::send ? " to rank " : " from rank ", operation.peer);
  if (operation.bytes >= 0) text += str(", ", operation.bytes, " bytes");
  return text;
}

inline std::int64_t last_change(const FlightRecorder::Operation& operation) {
  return std::max({operation.issued_ns, operation.began_ns, operation.ended_ns});
}

void FlightRecorder::describe(std::string schedule, int num_stages, int num_micro_batches, std::int64_t run) {
  const std::lock_guard lock(mutex_);
  schedule_ = std::move(schedule);
  num_stages_ = num_stages;
  num_micro_batches_ = num_micro_batches;
  run_ = run;
}

void FlightRecorder::set_step(std::int64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
}

void FlightRecorder::set_failure(const std::string& reason, bool threw) {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) return;
  failure_ = reason;
  threw_ = threw;
}

FlightRecorder::Id FlightRecorder::issue(Operation operation) {
  operation.issued_ns = now_ns();
  const std::lock_guard lock(mutex_);
  operation.in_step = step_;
  ring_[next_ % capacity] = operation;
  return next_++;
}

FlightRecorder::Id FlightRecorder::start(Operation operation) {
  operation.issued_ns = operation.began_ns = now_ns();
  const std::lock_guard lock(mutex_);
  operation.in_step = step_;
  ring_[next_ % capacity] = operation;
  return next_++;
}

void FlightRecorder::begin(Id id) {
  const std::int64_t now = now_ns();
  const std::lock_guard lock(mutex_);
  if (Operation* const operation = find(id)) operation->began_ns = now;
}

void FlightRecorder::end(Id id, std::int64_t bytes) {
  const std::int64_t now = now_ns();
  const std::lock_guard lock(mutex_);
  Operation* const operation = find(id);
  if (operation == nullptr) return;
  operation->ended_ns = now;
  if (operation->began_ns == 0) operation->began_ns = now;
  if (bytes >= 0) operation->bytes = bytes;
}

std::vector<FlightRecorder::Operation> FlightRecorder::operations() const {
  std::vector<Operation> all;
  for (Id id = next_ - std::min<Id>(next_, capacity); id < next_; ++id) all.push_back(ring_[id % capacity]);
  return all;
}

std::string FlightRecorder::last_lines(std::size_t count) const {
  std::unique_lock lock(mutex_);
  std::vector<Operation> all = operations();
  lock.unlock();
  std::stable_sort(all.begin(), all.end(),
                   [](const Operation& a, const Operation& b) { return last_change(a) < last_change(b); });
  if (all.size() > count) all.erase(all.begin(), all.end() - static_cast<std::ptrdiff_t>(count));
  if (all.empty()) return {};
  const std::int64_t now = now_ns();
  std::ostringstream out;
  out << std::fixed << std::setprecision(2) << "rank " << rank_ << " did last, in step " << all.back().in_step << ":";
  for (const Operation& operation : all) {
    const bool ended = operation.ended_ns != 0, began = operation.began_ns != 0;
    const auto age = static_cast<double>(now - last_change(operation)) * 1e-6;
    out << "\n    " << std::setw(9) << age << " ms ago  "
        << (ended   ? "ended  "
            : began ? "began  "
                    : "issued ")
        << recorded_text(operation);
  }
  return std::move(out).str();
}

std::string FlightRecorder::to_json() const {
  std::unique_lock lock(mutex_);
  const std::vector<Operation> all = operations();
  std::ostringstream out;
  out << R"({"format":"dualpipe record","version":1,"rank":)" << rank_ << ",\"ranks\":[";
  for (std::size_t i = 0; i < ranks_.size(); ++i) out << (i > 0 ? "," : "") << ranks_[i];
  out << "],\"run\":" << run_ << ",\"schedule\":" << json_quoted(schedule_) << ",\"stages\":" << num_stages_
      << ",\"micro_batches\":" << num_micro_batches_ << ",\"step\":" << step_
      << ",\"failure\":" << json_quoted(failure_) << ",\"threw\":" << (threw_ ? "true" : "false");
  lock.unlock();
  out << ",\"written_ns\":" << now_ns() << ",\"unix_ns\":" << wall_clock_ns() << ",\"operations\":[";
  const char* separator = "\n";
  for (const Operation& operation : all) {
    out << separator << "{\"do\":\"" << recorded_kind(operation.kind) << "\",";
    if (operation.kind == Kind::together)
      out << "\"name\":" << json_quoted(operation.name) << ",\"number\":" << operation.number;
    else
      out << "\"op\":\"" << to_string(operation.step) << '"';
    if (operation.peer >= 0) out << ",\"peer\":" << operation.peer;
    if (operation.bytes >= 0) out << ",\"bytes\":" << operation.bytes;
    out << ",\"step\":" << operation.in_step << ",\"state\":\""
        << (operation.ended_ns != 0   ? "done"
            : operation.began_ns != 0 ? "started"
                                      : "issued")
        << "\",\"issued_ns\":" << operation.issued_ns;
    if (operation.began_ns != 0) out << ",\"began_ns\":" << operation.began_ns;
    if (operation.ended_ns != 0) out << ",\"ended_ns\":" << operation.ended_ns;
    out << '}';
    separator = ",\n";
  }
  out << "\n]}\n";
  return std::move(out).str();
}

std::int64_t wall_clock_ns() {
  return std::chrono::nanoseconds(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::int64_t bytes_of(const Tensors& tensors) {
  std::int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined()) bytes += tensor.numel() * static_cast<std::int64_t>(tensor.element_size());
  return bytes;
}

}  // namespace dualpipe::detail
