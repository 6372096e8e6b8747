#include "contact/line.hpp"

#include <asio/read.hpp>
#include <asio/write.hpp>
#include <nlohmann/json.hpp>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

/// What a hundred thousand ranks say in one round.
constexpr std::uint32_t longest_text = 64 << 20;

}  // namespace

Line::Line(StreamSocket socket, Arrived arrived, Ended ended)
    : socket_(std::move(socket)), arrived_(std::move(arrived)), ended_(std::move(ended)) {}

void Line::start() { read_length(); }

Line::Frame Line::frame_of(const nlohmann::json& message) {
  const std::string text = message.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const auto length = static_cast<std::uint32_t>(text.size());
  return std::make_shared<std::string>(std::string(reinterpret_cast<const char*>(&length), sizeof length) + text);
}

void Line::send(const Frame& frame) {
  if (!is_open()) return;
  outgoing_.push_back(frame);
  if (outgoing_.size() == 1) write();
}

void Line::close() noexcept {
  arrived_ = {};
  ended_ = {};
  asio::error_code ignored;
  socket_.close(ignored);
}

void Line::write() {
  asio::async_write(socket_, asio::buffer(*outgoing_.front()),
                    [self = shared_from_this()](const asio::error_code& error, std::size_t) {
                      if (error) return;  // the reader learns why
                      self->outgoing_.pop_front();
                      if (!self->outgoing_.empty()) self->write();
                    });
}

void Line::read_length() {
  asio::async_read(socket_, asio::buffer(&length_, sizeof length_),
                   [self = shared_from_this()](const asio::error_code& error, std::size_t) {
                     if (error) return self->end(closed_by_peer(error) ? "" : error.message());
                     if (self->length_ > longest_text) return self->end(str("sends ", self->length_, " bytes at once"));
                     self->read_text();
                   });
}

void Line::read_text() {
  text_.resize(length_);
  asio::async_read(socket_, asio::buffer(text_),
                   [self = shared_from_this()](const asio::error_code& error, std::size_t) {
                     if (error) return self->end(closed_by_peer(error) ? "" : error.message());
                     self->listen_anew();
                     const auto arrived = self->arrived_;  // may close this line
                     if (!arrived) return;
                     try {
                       arrived(nlohmann::json::parse(self->text_));
                     } catch (const std::exception& problem) {
                       return self->end(str("sends something malformed (", problem.what(), ")"));
                     }
                     if (self->is_open()) self->read_length();
                   });
}

void Line::end(const std::string& why) {
  const auto ended = ended_;
  close();
  if (ended) ended(why);
}

}  // namespace dualpipe::detail
