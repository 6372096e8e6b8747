#include "socket/announcement.hpp"

#include <nlohmann/json.hpp>
#include <random>

#include "socket/host.hpp"
#include "socket/wire.hpp"

namespace dualpipe::detail {
namespace {

constexpr const char* kCardKey = "card";
constexpr const char* kEndpointsKey = "tcp";

std::string random_token() {
  std::random_device random;
  std::string token;
  while (token.size() < Announcements::kTokenLength) token += "0123456789abcdef"[random() % 16];
  return token;
}

}  // namespace

Announcements::Announcements(const World& world, Rendezvous& rendezvous, Route route)
    : world_(world), rendezvous_(rendezvous), cards_(static_cast<std::size_t>(world.size)) {
  Announcement& own = cards_[static_cast<std::size_t>(world.rank)];
  own.host = host_identity() + (route == Route::tcp ? str(" ", world.rank) : "");
  own.token = random_token();
  if (world.rank + 1 < world.size) own.unix_name = "dualpipe." + own.token;
}

void Announcements::exchange() {
  nlohmann::json card = {
      {"version", wire::kVersion}, {"size", world_.size}, {"host", own().host}, {"token", own().token}};
  if (!own().unix_name.empty()) card["unix"] = own().unix_name;
  rendezvous_.publish(kCardKey, card.dump());

  std::vector<int> others;
  for (int rank = 0; rank < world_.size; ++rank)
    if (rank != world_.rank) others.push_back(rank);
  const std::vector<std::string> texts = rendezvous_.collect(kCardKey, others);
  for (std::size_t i = 0; i < others.size(); ++i) read_card(others[i], texts[i]);
}

bool Announcements::has_far_callers() const {
  for (int rank = world_.rank + 1; rank < world_.size; ++rank)
    if (!is_near(rank)) return true;
  return false;
}

void Announcements::announce(std::uint16_t port) {
  const std::vector<std::string> addresses = own_addresses(world_);
  const std::string text = nlohmann::json({{"port", port}, {"addresses", addresses}}).dump();
  rendezvous_.publish(kEndpointsKey, text);
  read_endpoints(world_.rank, text);
}

void Announcements::read_far_endpoints() {
  std::vector<int> listeners;
  for (int rank = 0; rank < world_.rank; ++rank)
    if (is_far_listener(rank)) listeners.push_back(rank);
  const std::vector<std::string> texts = rendezvous_.collect(kEndpointsKey, listeners);
  for (std::size_t i = 0; i < listeners.size(); ++i) read_endpoints(listeners[i], texts[i]);
}

void Announcements::read_again(int rank) {
  read_card(rank, rendezvous_.collect(kCardKey, {rank}).front());
  if (is_far_listener(rank)) read_endpoints(rank, rendezvous_.collect(kEndpointsKey, {rank}).front());
}

void Announcements::read_card(int rank, const std::string& text) {
  const auto card = nlohmann::json::parse(text);
  const auto disagree = [&](const char* what, std::int64_t theirs, std::int64_t ours) {
    throw CommError(rank, "rendezvous",
                    str("rank ", world_.rank, ": rank ", rank, " has ", what, " ", theirs, ", this rank ", ours,
                        ": start all ranks from one build and with one WORLD_SIZE"));
  };
  const std::int64_t version = card.at("version");
  const std::int64_t size = card.at("size");
  if (version != wire::kVersion) disagree("protocol version", version, wire::kVersion);
  if (size != world_.size) disagree("WORLD_SIZE", size, world_.size);
  Announcement& known = cards_[static_cast<std::size_t>(rank)];
  known.host = card.at("host");
  known.token = card.at("token");
  known.unix_name = card.value("unix", "");
}

void Announcements::read_endpoints(int rank, const std::string& text) {
  const auto listener = nlohmann::json::parse(text);
  const std::uint16_t port = listener.at("port");
  auto& endpoints = cards_[static_cast<std::size_t>(rank)].endpoints;
  endpoints.clear();
  for (const std::string address : listener.at("addresses"))
    endpoints.emplace_back(asio::ip::make_address(address), port);
}

}  // namespace dualpipe::detail
